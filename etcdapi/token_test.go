package etcdapi

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/quire-db/quire/backend"
)

// keyPair writes a new pair of keys, and returns the names of the files.
func keyPair(t *testing.T, private crypto.Signer, err error) (privateFile, publicFile string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, der []byte, err error) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), name)
		if err == nil {
			err = os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	privateFile = write("private", "PRIVATE KEY", der, err)
	der, err = x509.MarshalPKIXPublicKey(private.Public())
	return privateFile, write("public", "PUBLIC KEY", der, err)
}

func parseTokens(t *testing.T, format string, args ...any) *Tokens {
	t.Helper()
	tokens, unknown, err := ParseTokens(fmt.Sprintf(format, args...))
	if err != nil || len(unknown) > 0 {
		t.Fatalf("unknown options %q, %v", unknown, err)
	}
	return &tokens
}

func TestJWTsAreThoseOfTheirKeyAndMethod(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	rsaPrivate, rsaPublic := keyPair(t, rsaKey, err)
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ecPrivate, ecPublic := keyPair(t, ecKey, err)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	edPrivate, edPublic := keyPair(t, edKey, err)
	// With a public key as its secret, which everybody may know.
	hmac := parseTokens(t, "jwt,sign-method=HS256,priv-key=%s", rsaPublic)

	now := time.Now()
	rev := float64(7)
	user := "ann"
	later := jwt.RegisteredClaims{ExpiresAt: jwt.NewNumericDate(now.Add(time.Hour))}
	for method, files := range map[string][2]string{
		"RS256": {rsaPrivate, rsaPublic}, "PS512": {rsaPrivate, rsaPublic}, "ES256": {ecPrivate, ecPublic}, "EdDSA": {edPrivate, edPublic},
	} {
		pair := parseTokens(t, "jwt,sign-method=%s,priv-key=%s,pub-key=%s", method, files[0], files[1]).jwt
		check := parseTokens(t, "jwt,pub-key=%s,sign-method=%s,ttl=1h", files[1], method).jwt
		token, err := pair.sign(user, 7, now)
		if err != nil {
			t.Fatal(err)
		}
		for what, k := range map[string]*jwtKeys{"both keys": pair, "the public key": check} {
			if who, err := k.caller(token); err != nil || who != (backend.Caller{Name: user, Revision: 7}) {
				t.Errorf("%s: with %s it is a token of %v, %v", method, what, who, err)
			}
		}
		if _, err := check.sign(user, 7, now); err == nil {
			t.Errorf("%s: a public key signs", method)
		}
		signed := func(m jwt.SigningMethod, key any, claims jwt.Claims) string {
			text, err := jwt.NewWithClaims(m, claims).SignedString(key)
			if err != nil {
				t.Fatal(err)
			}
			return text
		}
		good := jwtClaims{Username: &user, Revision: &rev, RegisteredClaims: later}
		for what, bad := range map[string]string{
			"nothing":                         "",
			"a simple token":                  drawToken(1),
			"no signature at all":             signed(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, good),
			"the public key used as a secret": signed(jwt.SigningMethodHS256, hmac.jwt.private, good),
			"no user":                         signed(pair.method, pair.private, jwtClaims{Revision: &rev, RegisteredClaims: later}),
			"no revision":                     signed(pair.method, pair.private, jwtClaims{Username: &user, RegisteredClaims: later}),
			"the past": signed(pair.method, pair.private, jwtClaims{Username: &user, Revision: &rev,
				RegisteredClaims: jwt.RegisteredClaims{ExpiresAt: jwt.NewNumericDate(now.Add(-time.Second))}}),
			"the future": signed(pair.method, pair.private, jwtClaims{Username: &user, Revision: &rev,
				RegisteredClaims: jwt.RegisteredClaims{NotBefore: jwt.NewNumericDate(now.Add(time.Hour))}}),
			"another text": token[:len(token)/2] + "A" + token[len(token)/2:],
		} {
			if who, err := pair.caller(bad); err == nil {
				t.Errorf("%s: a token with %s is one of %v", method, what, who)
			}
		}
		huge := 1e300
		who, err := pair.caller(signed(pair.method, pair.private, jwtClaims{Username: &user, Revision: &huge, RegisteredClaims: later}))
		if err != nil || who.Revision == backend.ByItself || who.Revision < 7 {
			t.Errorf("%s: a huge revision is %d, %v", method, who.Revision, err)
		}
	}
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	otherPrivate, _ := keyPair(t, other, err)
	if _, _, err := ParseTokens("jwt,sign-method=RS256,priv-key=" + otherPrivate + ",pub-key=" + rsaPublic); err == nil || err.Error() != "auth: public and private keys don't match" {
		t.Errorf("keys of two pairs: %v", err)
	}
}

func TestAuthTokenFlag(t *testing.T) {
	for _, spec := range []string{
		"jwtt", "jwt", "simple,ttl", "jwt,sign-method=RS256", "jwt,sign-method=none", "jwt,sign-method=RS256,priv-key=/nowhere",
		"jwt,sign-method=HS256,sign-method=HS256", "jwt,ttl=x,sign-method=HS256", "jwt,ttl=1=2",
	} {
		if _, _, err := ParseTokens(spec); err == nil {
			t.Errorf("%q is taken", spec)
		}
	}
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, unknown, err := ParseTokens("jwt,sign-method=HS256,color=red,priv-key=" + key); err != nil || !slices.Equal(unknown, []string{"color"}) {
		t.Errorf("unknown options %q, %v", unknown, err)
	}
}

func TestSimpleTokensAreDrawnEvenly(t *testing.T) {
	count := make(map[rune]int)
	for i := range 2000 {
		token := drawToken(uint64(i))
		if !regexp.MustCompile(`^[a-zA-Z]{16}\.[0-9]+$`).MatchString(token) {
			t.Fatalf("a token %q", token)
		}
		letters, _, _ := strings.Cut(token, ".")
		for _, c := range letters {
			count[c]++
		}
	}
	for _, c := range tokenLetters {
		if n := count[c]; n < 450 || n > 800 { // 615 on average, with a deviation of 25
			t.Errorf("%c came %d times of 32000", c, n)
		}
	}
}
