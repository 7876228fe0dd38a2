package etcdapi

import (
	"crypto/tls"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestAccess(t *testing.T) {
	for _, x := range []struct {
		name, origins, hosts string
		tls                  bool
		host, origin         string
		status               int
		allowed              string // origin
	}{
		{name: "no rules", host: "anything:80", origin: "http://page", status: 200, allowed: "*"},
		{name: "stars", origins: "*", hosts: "*", host: "anything", status: 200, allowed: "*"},
		{name: "a host of the list", hosts: "a.example,b.example", host: "b.example:2379", status: 200, allowed: "*"},
		{name: "another host", hosts: "a.example", host: "b.example:2379", status: 421},
		{name: "another host by TLS", hosts: "a.example", host: "b.example", tls: true, status: 200, allowed: "*"},
		{name: "an IPv6 address", hosts: "::1", host: "[::1]:2379", status: 200, allowed: "*"},
		{name: "an origin of the list", origins: "http://a,http://b", host: "x", origin: "http://b", status: 200, allowed: "http://b"},
		{name: "another origin", origins: "http://a", host: "x", origin: "http://b", status: 200},
		{name: "no origin", origins: "http://a", host: "x", status: 200},
	} {
		list := func(s string) []string {
			return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
		}
		var rejected string
		served := ""
		a := Access{Origins: list(x.origins), Hosts: list(x.hosts), Rejected: func(host string) { rejected = host }}
		h := a.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { served = r.URL.Path }))
		for _, method := range []string{http.MethodPost, http.MethodOptions} {
			served, rejected = "", ""
			r := httptest.NewRequest(method, "/v3beta/kv/put", nil)
			r.Host = x.host
			r.Header.Set("Origin", x.origin)
			if x.tls {
				r.TLS = &tls.ConnectionState{}
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != x.status || w.Header().Get("Access-Control-Allow-Origin") != x.allowed {
				t.Errorf("%s, %s: status %d, origin %q, want %d, %q", x.name, method, w.Code, w.Header().Get("Access-Control-Allow-Origin"), x.status, x.allowed)
			}
			if want := x.status == 421; (rejected != "") != want || want && !strings.Contains(w.Body.String(), "--host-whitelist") {
				t.Errorf("%s, %s: rejected %q, %s", x.name, method, rejected, w.Body)
			}
			want := ""
			if method == http.MethodPost && x.status == 200 {
				want = "/v3/kv/put"
			}
			if served != want {
				t.Errorf("%s, %s: served %q, want %q", x.name, method, served, want)
			}
		}
	}
}
