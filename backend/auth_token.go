package backend

import (
	"bytes"
	"sync"
	"time"
)

// authToken is a token that a user was given. Only its hash is known here: whoever reads the log or the database cannot use
// it. It is good for as long as its user has the password that it was given for, and auth is not switched off.
type authToken struct {
	Hash string `json:"hash"`
	User string `json:"user"`

	password []byte // hash of the password
	epoch    uint64 // see Auth.epoch
}

func (a *Auth) token(hash, user string) authToken {
	return authToken{Hash: hash, User: user, password: a.users[user].GetPassword(), epoch: a.epoch}
}

func (t *authToken) good(a *Auth) bool {
	u := a.users[t.User]
	return a.enabled && a.epoch == t.epoch && u != nil && bytes.Equal(u.Password, t.password)
}

// authTokens are the tokens that may be good. They live in memory, in every process that serves the store: a token that one
// of them gave out is good at all of them. A token that was not used for some time in this process ends, and all do with it.
type authTokens struct {
	mu     sync.Mutex
	byHash map[string]*keptToken
	ttl    time.Duration
	swept  time.Time
}

type keptToken struct {
	authToken
	until time.Time
}

const defaultTokenTTL = 5 * time.Minute

// sweepTokens is how often those are looked for that have ended.
const sweepTokens = time.Second

func (t *authTokens) init(ttl time.Duration) {
	t.ttl = ttl
	t.byHash = make(map[string]*keptToken)
}

// keep takes the tokens of a durable batch.
func (t *authTokens) keep(tokens []authToken) {
	if len(tokens) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	for _, token := range tokens {
		t.byHash[token.Hash] = &keptToken{token, now.Add(t.ttl)}
	}
	if now.Sub(t.swept) < sweepTokens {
		return
	}
	t.swept = now
	for hash, token := range t.byHash {
		if now.After(token.until) {
			delete(t.byHash, hash)
		}
	}
}

// forget ends all tokens here: whether auth was switched off in between is not known of a state that was not reached by Commands.
func (t *authTokens) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.byHash)
}

// find returns a token, and prolongs it.
func (t *authTokens) find(hash string) (authToken, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	token, now := t.byHash[hash], time.Now()
	if token == nil || now.After(token.until) {
		return authToken{}, false
	}
	token.until = now.Add(t.ttl)
	return token.authToken, true
}

// TokenUser returns whose token has this hash, by auth. ok is false for a token that is not good, or that another process
// gave out and this one has not heard of: see Ready.
func (db *DB) TokenUser(hash string, auth *Auth) (user string, ok bool) {
	token, ok := db.tokens.find(hash)
	if !ok || !token.good(auth) {
		return "", false
	}
	return token.User, true
}
