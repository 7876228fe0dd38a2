package etcdapi

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
)

// Access says which web pages may use the HTTP endpoints of client traffic: --cors and --host-whitelist. No entry, like "*",
// means all.
type Access struct {
	Origins []string // of pages; their browsers ask before they let them
	Hosts   []string // that requests without TLS may name
	// Rejected is told of the host of a request that was refused. It may be nil.
	Rejected func(host string)
	// NamedByCertificate says whether clients are known by the common names of their certificates at present, which does not
	// work through the JSON gateway. nil: they are not.
	NamedByCertificate func() bool
}

func (a *Access) allows(list []string, what string) bool {
	return len(list) == 0 || slices.Contains(list, "*") || slices.Contains(list, what)
}

// Handler puts the rules before h. A page that was led to this address by a name of its own (DNS rebinding) names that; what
// comes by TLS cannot, its certificate would not fit. Methods, headers and status codes are etcd's (server/v3/embed:
// accessController).
func (a *Access) Handler(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// What older clients call it.
		if rest, ok := strings.CutPrefix(r.URL.Path, "/v3beta/"); ok {
			r.URL.Path = "/v3/" + rest
		}
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		if r.TLS == nil && !a.allows(a.Hosts, host) {
			if a.Rejected != nil {
				a.Rejected(host)
			}
			http.Error(w, fmt.Sprintf("this server does not answer to the name %q without TLS (CVE-2018-5702, DNS rebinding): use TLS, or add the name to --host-whitelist", host), http.StatusMisdirectedRequest)
			return
		}
		if r.TLS != nil && strings.HasPrefix(r.URL.Path, "/v3/") && bearsName(r.TLS) && a.NamedByCertificate != nil && a.NamedByCertificate() {
			// etcd's text.
			http.Error(w, "CommonName of client sending a request against gateway will be ignored and not used as expected", http.StatusBadRequest)
			return
		}
		if origin := r.Header.Get("Origin"); a.allows(a.Origins, "*") {
			allowOrigin(w, "*")
		} else if a.allows(a.Origins, origin) {
			allowOrigin(w, origin)
		}
		if r.Method == http.MethodOptions {
			return
		}
		h.ServeHTTP(w, r)
	})
}

// bearsName says whether a client has shown a certificate with a common name.
func bearsName(state *tls.ConnectionState) bool {
	for _, chain := range state.VerifiedChains {
		if len(chain) > 0 && chain[0].Subject.CommonName != "" {
			return true
		}
	}
	return false
}

func allowOrigin(w http.ResponseWriter, origin string) {
	w.Header().Add("Access-Control-Allow-Methods", "POST, GET, OPTIONS, PUT, DELETE")
	w.Header().Add("Access-Control-Allow-Origin", origin)
	w.Header().Add("Access-Control-Allow-Headers", "accept, content-type, authorization")
}
