package main

import (
	"fmt"

	"go.uber.org/zap"
	"golang.org/x/crypto/bcrypt"

	"github.com/quire-db/quire/etcdapi"
)

// authTokens reads --auth-token, with etcd's warnings.
func authTokens(c *config, lg *zap.Logger) (etcdapi.Tokens, error) {
	if c.AuthToken == "simple" {
		lg.Warn("simple token is not cryptographically signed")
	}
	tokens, unknown, err := etcdapi.ParseTokens(c.AuthToken)
	if err != nil {
		return tokens, fmt.Errorf("--auth-token: %w", err)
	}
	if len(unknown) > 0 {
		lg.Warn("unknown JWT options", zap.Strings("keys", unknown))
	}
	return tokens, nil
}

// bcryptCost is the one asked for, or etcd's default with its warning where there is no such cost.
func bcryptCost(c *config, lg *zap.Logger) int {
	if cost := c.BcryptCost; cost >= uint(bcrypt.MinCost) && cost <= uint(bcrypt.MaxCost) {
		return int(cost)
	}
	lg.Warn("use default bcrypt cost instead of the invalid given cost",
		zap.Int("min-cost", bcrypt.MinCost), zap.Int("max-cost", bcrypt.MaxCost),
		zap.Int("default-cost", bcrypt.DefaultCost), zap.Uint("given-cost", c.BcryptCost))
	return bcrypt.DefaultCost
}

// logAuthFailed logs passwords that did not fit, with etcd's message. Who tries many is to be seen.
func logAuthFailed(lg *zap.Logger) func(user string, err error) {
	return func(user string, err error) {
		lg.Warn("invalid authentication was requested", zap.String("user", user), zap.Error(err))
	}
}
