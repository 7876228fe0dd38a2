package etcdapi

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/golang-jwt/jwt/v5"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/quire-db/quire/backend"
)

// Tokens says what tokens are (--auth-token). The zero value gives out simple ones.
type Tokens struct {
	none bool
	jwt  *jwtKeys // nil: simple tokens
}

// A simple token is sixteen random letters, a point and a number, as etcd's are. They mean nothing by themselves: the
// store knows their hash.
const (
	tokenLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	tokenLength  = 16
)

// drawToken makes a simple token. The number only makes it look like etcd's, which tells a member by it how long to wait
// until it knows the token: see caller.
func drawToken(index uint64) string {
	letters := make([]byte, 0, tokenLength)
	var random [4 * tokenLength]byte
	for len(letters) < tokenLength {
		rand.Read(random[:]) // it never fails
		for _, r := range random {
			// The rest would make the first letters more likely.
			if whole := 256 / len(tokenLetters) * len(tokenLetters); int(r) < whole && len(letters) < tokenLength {
				letters = append(letters, tokenLetters[int(r)%len(tokenLetters)])
			}
		}
	}
	return fmt.Sprintf("%s.%d", letters, index)
}

func hashOf(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// give makes a token for a user, whose password has been checked against auth.
func (t *Tokens) give(ctx context.Context, s *Server, user string, auth *backend.Auth) (token string, header *pb.ResponseHeader, err error) {
	switch {
	case t.none:
		return "", nil, backend.ErrAuthFailed
	case t.jwt != nil:
		token, err = t.jwt.sign(user, auth.Revision(), time.Now())
		return token, nil, err
	}
	token = drawToken(s.opts.Backend.Stats().AppliedIndex)
	resp, err := propose[*pb.AuthenticateResponse](ctx, s, "Authenticate", backend.Command{
		Request: &pb.InternalAuthenticateRequest{Name: user, SimpleToken: hashOf(token)},
	})
	return token, resp.GetHeader(), err
}

// caller is whose token it is, to be checked against auth.
func (t *Tokens) caller(ctx context.Context, s *Server, token string, auth *backend.Auth) (backend.Caller, error) {
	switch {
	case t.none:
		return backend.Caller{}, rpctypes.ErrGRPCInvalidAuthToken
	case t.jwt != nil:
		who, err := t.jwt.caller(token)
		if err != nil {
			return backend.Caller{}, rpctypes.ErrGRPCInvalidAuthToken
		}
		return who, nil
	}
	hash := hashOf(token)
	if user, ok := s.opts.Backend.TokenUser(hash, auth); ok {
		return backend.Caller{Name: user, Revision: auth.Revision()}, nil
	}
	// Another process may have given it out a moment ago.
	if err := s.ready(ctx, false); err != nil {
		return backend.Caller{}, err
	}
	if auth = s.opts.Backend.Auth(); !auth.Enabled() {
		return backend.Caller{}, nil
	}
	if user, ok := s.opts.Backend.TokenUser(hash, auth); ok {
		return backend.Caller{Name: user, Revision: auth.Revision()}, nil
	}
	return backend.Caller{}, rpctypes.ErrGRPCInvalidAuthToken
}

// jwtKeys sign and check JSON web tokens (RFC 7519) with etcd's claims.
type jwtKeys struct {
	method  jwt.SigningMethod
	private any // nil: tokens are only checked here
	public  any
	ttl     time.Duration
}

// maxClaimedRevision is the last of the whole numbers that a float64 can tell apart. It is no backend.ByItself.
const maxClaimedRevision = 1 << 53

// jwtClaims are etcd's.
type jwtClaims struct {
	Username *string  `json:"username"`
	Revision *float64 `json:"revision"`
	jwt.RegisteredClaims
}

func (k *jwtKeys) sign(user string, revision uint64, now time.Time) (string, error) {
	if k.private == nil {
		return "", errVerifyOnly
	}
	rev := float64(revision)
	return jwt.NewWithClaims(k.method, jwtClaims{
		Username: &user, Revision: &rev, RegisteredClaims: jwt.RegisteredClaims{ExpiresAt: jwt.NewNumericDate(now.Add(k.ttl))},
	}).SignedString(k.private)
}

// caller checks a token's signature, which must be of the method configured, and its times.
func (k *jwtKeys) caller(token string) (backend.Caller, error) {
	var claims jwtClaims
	if _, err := jwt.ParseWithClaims(token, &claims, func(*jwt.Token) (any, error) { return k.public, nil },
		jwt.WithValidMethods([]string{k.method.Alg()})); err != nil {
		return backend.Caller{}, err
	}
	if claims.Username == nil || claims.Revision == nil {
		return backend.Caller{}, errors.New("the token does not name a user and a revision")
	}
	return backend.Caller{Name: *claims.Username, Revision: uint64(min(max(*claims.Revision, 0), maxClaimedRevision))}, nil
}
