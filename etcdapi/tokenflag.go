package etcdapi

import (
	"crypto"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

var errVerifyOnly = errors.New("auth: token signing attempted with verify-only key") // etcd's text

// defaultJWTTTL is etcd's.
const defaultJWTTTL = 5 * time.Minute

// ParseTokens reads --auth-token: "simple", "jwt" with comma-separated pub-key, priv-key (files), sign-method and ttl, or
// nothing, which gives out no tokens. unknown lists options that mean nothing.
func ParseTokens(spec string) (t Tokens, unknown []string, err error) {
	kind, rest, _ := strings.Cut(spec, ",")
	options := make(map[string]string)
	if rest != "" {
		for _, pair := range strings.Split(rest, ",") {
			name, value, found := strings.Cut(pair, "=")
			if _, twice := options[name]; !found || twice || strings.Contains(value, "=") {
				return t, nil, fmt.Errorf("auth: invalid auth options: %q in --auth-token must be name=value, each name once", pair)
			}
			options[name] = value
		}
	}
	switch kind {
	case "simple":
		return t, nil, nil
	case "":
		return Tokens{none: true}, nil, nil
	case "jwt":
		t.jwt, unknown, err = parseJWT(options)
		return t, unknown, err
	}
	return t, nil, fmt.Errorf("auth: invalid auth options: --auth-token has no kind %q, use simple or jwt", kind)
}

// parseJWT reads the options of a jwt.
func parseJWT(options map[string]string) (k *jwtKeys, unknown []string, err error) {
	k = &jwtKeys{ttl: defaultJWTTTL}
	var private, public []byte
	for name, value := range options {
		switch name {
		case "sign-method":
			k.method = jwt.GetSigningMethod(value)
		case "ttl":
			k.ttl, err = time.ParseDuration(value)
		case "priv-key":
			private, err = os.ReadFile(value)
		case "pub-key":
			public, err = os.ReadFile(value)
		default:
			unknown = append(unknown, name)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("auth: invalid auth options: %s of --auth-token: %w", name, err)
		}
	}
	if k.method == nil {
		return nil, nil, errors.New("auth: invalid auth options: --auth-token=jwt needs a sign-method such as RS256, ES256, EdDSA or HS256")
	}
	if err := k.read(private, public); err != nil {
		return nil, nil, err
	}
	return k, unknown, nil
}

// read takes the keys from the contents of their files; those of a pair must fit each other.
func (k *jwtKeys) read(private, public []byte) error {
	var parsePrivate func([]byte) (crypto.Signer, error)
	var parsePublic func([]byte) (crypto.PublicKey, error)
	switch k.method.(type) {
	case *jwt.SigningMethodHMAC:
		if len(private) == 0 {
			return errMissingKey
		}
		k.private, k.public = private, private
		return nil
	case *jwt.SigningMethodRSA, *jwt.SigningMethodRSAPSS:
		parsePrivate = func(b []byte) (crypto.Signer, error) { return jwt.ParseRSAPrivateKeyFromPEM(b) }
		parsePublic = func(b []byte) (crypto.PublicKey, error) { return jwt.ParseRSAPublicKeyFromPEM(b) }
	case *jwt.SigningMethodECDSA:
		parsePrivate = func(b []byte) (crypto.Signer, error) { return jwt.ParseECPrivateKeyFromPEM(b) }
		parsePublic = func(b []byte) (crypto.PublicKey, error) { return jwt.ParseECPublicKeyFromPEM(b) }
	case *jwt.SigningMethodEd25519:
		parsePrivate = func(b []byte) (crypto.Signer, error) {
			key, err := jwt.ParseEdPrivateKeyFromPEM(b)
			if err != nil {
				return nil, err
			}
			return key.(ed25519.PrivateKey), nil
		}
		parsePublic = jwt.ParseEdPublicKeyFromPEM
	default:
		return fmt.Errorf("unsupported signing method: %s", k.method.Alg())
	}
	if len(private) > 0 {
		key, err := parsePrivate(private)
		if err != nil {
			return fmt.Errorf("priv-key of --auth-token: %w", err)
		}
		k.private, k.public = key, key.Public()
	}
	if len(public) > 0 {
		key, err := parsePublic(public)
		if err != nil {
			return fmt.Errorf("pub-key of --auth-token: %w", err)
		}
		if own, ok := k.public.(interface{ Equal(crypto.PublicKey) bool }); ok && !own.Equal(key) {
			return errors.New("auth: public and private keys don't match")
		}
		k.public = key
	}
	if k.public == nil {
		return errMissingKey
	}
	return nil
}

var errMissingKey = errors.New("auth: missing key data: --auth-token=jwt needs a priv-key, or a pub-key to check tokens only")
