package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"

	"google.golang.org/grpc/credentials"
)

// doorCredentials tell grpc-go about the TLS handshake that the door has already done, so that handlers find
// the client's certificate where they would find it otherwise (peer.FromContext).
type doorCredentials struct{}

type plainAuth struct{ credentials.CommonAuthInfo }

func (plainAuth) AuthType() string { return "insecure" }

func (doorCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if state := tlsState(conn); state != nil {
		return conn, credentials.TLSInfo{
			State:          *state,
			CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		}, nil
	}
	return conn, plainAuth{credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}}, nil
}

func (doorCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("doorCredentials are for servers")
}

func (doorCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
func (c doorCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName belongs to the interface; servers do not use it.
func (doorCredentials) OverrideServerName(string) error { return nil }

// tlsState is nil for a connection without TLS.
func tlsState(conn net.Conn) *tls.ConnectionState {
	if c, ok := conn.(*doorConn); ok {
		return c.state
	}
	return nil
}

type tlsStateKey struct{}

// withTLSState keeps the handshake for requests of the connection (http.Server.ConnContext).
func withTLSState(ctx context.Context, conn net.Conn) context.Context {
	if state := tlsState(conn); state != nil {
		return context.WithValue(ctx, tlsStateKey{}, state)
	}
	return ctx
}

// fillTLS sets Request.TLS, which net/http leaves empty because it sees connections that the door has decrypted.
func fillTLS(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if state, ok := r.Context().Value(tlsStateKey{}).(*tls.ConnectionState); ok && r.TLS == nil {
			clone := *r
			clone.TLS = state
			r = &clone
		}
		next.ServeHTTP(w, r)
	})
}
