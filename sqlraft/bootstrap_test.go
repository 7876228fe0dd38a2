package sqlraft

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quire-db/quire/backend"
)

func TestIDsAreThoseOfEtcd(t *testing.T) {
	// What etcd 3.7 logs when it is started with these flags.
	if id := MemberID([]string{"http://localhost:2380"}, "etcd-cluster"); id != 0x8e9e05c52164694d {
		t.Errorf("a member's id is %x", id)
	}
	if id := ClusterID([]uint64{0x8e9e05c52164694d}); id != 0xcdf818194e3a8c32 {
		t.Errorf("a cluster's id is %x", id)
	}
	if MemberID([]string{"http://b:1", "http://a:1"}, "t") != MemberID([]string{"http://a:1", "http://b:1"}, "t") {
		t.Error("a member's id depends on the order of its URLs")
	}
	if ClusterID([]uint64{2, 1}) != ClusterID([]uint64{1, 2}) {
		t.Error("a cluster's id depends on the order of its members")
	}
	if at := time.Unix(1700000000, 5); addedMemberID([]string{"http://a:1"}, at) != MemberID([]string{"http://a:1"}, "1700000000") {
		t.Error("the id of a member that is added depends on more than URLs and seconds")
	}
}

// names is a Resolver.
type names struct {
	hosts map[string][]string
	srv   map[string][]*net.SRV
	fails atomic.Int32 // so many lookups fail at first
}

func (n *names) LookupIPAddr(_ context.Context, host string) (all []net.IPAddr, _ error) {
	if n.fails.Add(-1) >= 0 || n.hosts[strings.TrimSuffix(host, ".")] == nil {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	for _, ip := range n.hosts[strings.TrimSuffix(host, ".")] {
		all = append(all, net.IPAddr{IP: net.ParseIP(ip)})
	}
	return all, nil
}

func (n *names) LookupSRV(_ context.Context, service, proto, domain string) (string, []*net.SRV, error) {
	records, ok := n.srv["_"+service+"._"+proto+"."+domain]
	if !ok {
		return "", nil, &net.DNSError{Err: "no such host", Name: domain, IsNotFound: true}
	}
	return "", records, nil
}

func TestANewClusterStartsFromTheList(t *testing.T) {
	const list = "n1=http://127.0.0.1:1,n2=http://127.0.0.1:3,n1=http://127.0.0.1:2"
	var all []*Bootstrapped
	for name, urls := range map[string][]string{"n1": {"http://127.0.0.1:2", "http://127.0.0.1:1"}, "n2": {"http://127.0.0.1:3"}} {
		b, err := Bootstrap(t.Context(), BootstrapOptions{Name: name, InitialCluster: list, Token: "tok", PeerURLs: urls})
		if err != nil {
			t.Fatal(err)
		}
		if b.ID != MemberID(urls, "tok") || b.Joining || b.Lost {
			t.Errorf("%s: %+v", name, b)
		}
		all = append(all, b)
	}
	a, b := all[0].Membership, all[1].Membership
	if a.ClusterID != b.ClusterID || a.ClusterID != ClusterID([]uint64{all[0].ID, all[1].ID}) || fmt.Sprint(a) != fmt.Sprint(b) {
		t.Errorf("the members start from different lists: %+v, %+v", a, b)
	}
	if len(a.Members) != 2 || a.Members[0].ID > a.Members[1].ID {
		t.Errorf("members %+v", a.Members)
	}
}

// TestBootstrapMistakes: the texts are etcd's.
func TestBootstrapMistakes(t *testing.T) {
	dns := &names{hosts: map[string][]string{"a.example": {"10.0.0.1"}, "b.example": {"10.0.0.2"}}}
	for _, x := range []struct{ name, list, urls, want string }{
		{"n3", "n1=http://127.0.0.1:1,n2=http://127.0.0.1:2", "http://127.0.0.1:3", `couldn't find local name "n3" in the initial cluster configuration`},
		{"n1", "", "http://127.0.0.1:3", `couldn't find local name "n1" in the initial cluster configuration`},
		{"n1", "n1=http://127.0.0.1:1,n2=http://127.0.0.1:1", "http://127.0.0.1:1", "initial cluster n1=http://127.0.0.1:1,n2=http://127.0.0.1:1 has duplicate url"},
		{"n1", "n1=http://127.0.0.1:1,n1=http://127.0.0.1:1", "http://127.0.0.1:1,http://127.0.0.1:1", "has duplicate url"},
		{"n1", "n1=http://127.0.0.1:1", "http://127.0.0.1:2", "--initial-cluster has n1=http://127.0.0.1:1 but missing from --initial-advertise-peer-urls=http://127.0.0.1:2"},
		{"n1", "n1=http://127.0.0.1:1", "http://127.0.0.1:1,http://127.0.0.1:2", "--initial-advertise-peer-urls has http://127.0.0.1:2 but missing from --initial-cluster=n1=http://127.0.0.1:1"},
		{"n1", "n1=http://a.example:1", "http://b.example:1", "--initial-cluster has n1=http://a.example:1 but missing from"},
		{"n1", "n1=ftp://127.0.0.1:1", "http://127.0.0.1:1", "URL scheme must be http, https, unix, or unixs: ftp://127.0.0.1:1"},
		{"n1", "n1", "http://127.0.0.1:1", "URL scheme must be http, https, unix, or unixs: "},
		{"n1", "n1=http://127.0.0.1", "http://127.0.0.1:1", `URL address does not have the form "host:port": http://127.0.0.1`},
		{"n1", "n1=http://127.0.0.1:1/x", "http://127.0.0.1:1", "URL must not contain a path: http://127.0.0.1:1/x"},
	} {
		_, err := Bootstrap(t.Context(), BootstrapOptions{Name: x.name, InitialCluster: x.list, PeerURLs: strings.Split(x.urls, ","), Resolver: dns})
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s in %q, advertising %s: %v", x.name, x.list, x.urls, err)
		}
	}
	// Two names of one address are the same, also when DNS is late.
	dns.hosts["c.example"] = []string{"10.0.0.9", "10.0.0.1"}
	dns.fails.Store(1)
	if _, err := Bootstrap(t.Context(), BootstrapOptions{Name: "n1", InitialCluster: "n1=http://a.example:1,n2=unix://x", PeerURLs: []string{"http://10.0.0.1:1"}, Resolver: dns}); err != nil {
		t.Error(err)
	}
}

// membersAt serves GET /members.
func membersAt(t *testing.T, cluster string, members ...string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/members" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("X-Etcd-Cluster-ID", cluster)
		fmt.Fprintf(w, "[%s]", strings.Join(members, ","))
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func TestJoiningACluster(t *testing.T) {
	const self = "http://127.0.0.1:1"
	// The peers' own URLs are known only once they listen.
	var urls [2]string
	member := func(id int, url *string, more string) string {
		return fmt.Sprintf(`{"id":%d,"peerURLs":["%s"]%s}`, id, *url, more)
	}
	own := self
	start := func(more string, also ...string) string {
		s := httptest.NewUnstartedServer(nil)
		urls[0] = "http://" + s.Listener.Addr().String()
		list := append([]string{member(7, &own, more), member(5, &urls[0], `,"name":"n2","clientURLs":["http://c:1"]`)}, also...)
		s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Etcd-Cluster-ID", "cafe")
			fmt.Fprintf(w, "[%s]", strings.Join(list, ","))
		})
		s.Start()
		t.Cleanup(s.Close)
		return urls[0]
	}
	join := func(list string) (*Bootstrapped, error) {
		return Bootstrap(t.Context(), BootstrapOptions{Name: "n1", InitialCluster: list, Existing: true, PeerURLs: []string{"http://else:1"}, MaxLearners: 1, Timeout: 3 * time.Second})
	}

	n2 := start("")
	b, err := join("n1=" + self + ",n2=" + n2)
	if err != nil {
		t.Fatal(err)
	}
	if b.ID != 7 || b.Membership.ClusterID != 0xcafe || !b.Joining || b.Lost || len(b.Membership.Members) != 2 || b.Membership.Members[0].ID != 5 {
		t.Errorf("%+v", b)
	}

	// It was there before.
	if b, err := join("n1=" + self + ",n2=" + start(`,"name":"n1","clientURLs":["http://c:2"]`)); err != nil || !b.Lost {
		t.Errorf("a member that comes back without its data: %+v, %v", b, err)
	}
	// A name alone comes from the flags of the first members.
	if b, err := join("n1=" + self + ",n2=" + start(`,"name":"n1"`)); err != nil || b.Lost {
		t.Errorf("a member that has never started: %+v, %v", b, err)
	}
	if b, err := join("n1=" + self + ",n2=" + start(`,"isLearner":true`)); err != nil || !memberOf(b.Membership, 7).Learner {
		t.Errorf("a learner: %+v, %v", b, err)
	}
	if _, err := join("n1=" + self + ",n2=" + start(`,"isLearner":true`, `{"id":9,"peerURLs":["http://127.0.0.1:9"],"isLearner":true}`) + ",n3=http://127.0.0.1:9"); !errors.Is(err, errTooManyLearners) {
		t.Errorf("two learners where one may be: %v", err)
	}
	if _, err := join("n1=" + self + ",n3=http://127.0.0.1:9,n2=" + start("")); err == nil || !strings.Contains(err.Error(), "error validating peerURLs {5=") || !strings.Contains(err.Error(), "member count is unequal") {
		t.Errorf("a member too many: %v", err)
	}
	if _, err := join("n1=http://127.0.0.1:2,n2=" + start("")); err == nil || !strings.Contains(err.Error(), "PeerURLs: no match found for existing member (7, [http://127.0.0.1:1]), last resolver error (") {
		t.Errorf("a member with other URLs: %v", err)
	}
	dead := httptest.NewServer(nil)
	dead.Close()
	if _, err := join("n1=" + self + ",n2=" + dead.URL); err == nil || !strings.Contains(err.Error(), "cannot fetch cluster info from peer urls: could not retrieve cluster information from the given URLs") {
		t.Errorf("nobody answers: %v", err)
	}

	// One that lags does not know this member yet, one is dead, one answers nonsense: the other one counts.
	lags := membersAt(t, "cafe", `{"id":5,"peerURLs":["http://127.0.0.1:9"]}`)
	nonsense := membersAt(t, "cafe", "what?")
	empty := membersAt(t, "cafe")
	third := fmt.Sprintf(`{"id":6,"peerURLs":["%s","%s","%s","%s"]}`, lags, dead.URL, nonsense, empty)
	if b, err := join("n1=" + self + ",n2=" + start("", third) + ",n3=" + lags + ",n3=" + dead.URL + ",n3=" + nonsense + ",n3=" + empty); err != nil || b.ID != 7 {
		t.Errorf("%+v, %v", b, err)
	}
	// Two clusters.
	n2 = start("")
	other := membersAt(t, "beef", member(7, &own, ""), fmt.Sprintf(`{"id":5,"peerURLs":["%s","http://127.0.0.1:8"]}`, n2))
	if _, err := join("n1=" + self + ",n2=" + n2 + ",n2=" + other); err == nil {
		t.Error("joined one of two clusters")
	}
}

// TestNobodyHangsTheStart: an address that swallows everything.
func TestNobodyHangsTheStart(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // and nobody accepts
	hole := "http://" + l.Addr().String()
	began := time.Now()
	var told atomic.Int32
	b, err := Bootstrap(t.Context(), BootstrapOptions{Name: "n1", InitialCluster: "n1=http://127.0.0.1:1,n2=" + hole, PeerURLs: []string{"http://127.0.0.1:1"},
		Timeout: 300 * time.Millisecond, Unreached: func(string, error) { told.Add(1) }})
	if err != nil || b.Joining {
		t.Errorf("%+v, %v", b, err)
	}
	if took := time.Since(began); took > 2*time.Second || told.Load() != 1 {
		t.Errorf("it took %v, and %d URLs were reported", took, told.Load())
	}
}

func TestANewClusterIsNotFoundedTwice(t *testing.T) {
	const self = "http://127.0.0.1:1"
	id := MemberID([]string{self}, "tok")
	found := func(more string) error {
		n2 := membersAt(t, "cafe", fmt.Sprintf(`{"id":%d,"name":"n1","peerURLs":["%s"]%s}`, id, self, more))
		_, err := Bootstrap(t.Context(), BootstrapOptions{Name: "n1", InitialCluster: "n1=" + self + ",n2=" + n2, Token: "tok", PeerURLs: []string{self}})
		return err
	}
	if err := found(""); err != nil {
		t.Errorf("a member that has never started: %v", err)
	}
	if err := found(`,"clientURLs":["http://c:1"]`); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("member %x has already been bootstrapped", id)) {
		t.Errorf("a member that has lost its data: %v", err)
	}
}

// TestBootstrapFromATransport: the real other side, with TLS, and one that has been started before.
func TestBootstrapFromATransport(t *testing.T) {
	ca := newTestCA(t, "ca")
	m := newSecureMember(t, 5, ca.config(t, "n"), ca.config(t, "n"))
	m.know(backend.Membership{ClusterID: testCluster, Members: []backend.Member{
		{ID: 3, Name: "n1", PeerURLs: []string{"https://127.0.0.1:1"}, ClientURLs: []string{"http://c:1"}},
		{ID: 5, PeerURLs: []string{m.url}}}})
	o := BootstrapOptions{Name: "n1", InitialCluster: "n1=https://127.0.0.1:1,n2=" + m.url, Existing: true, ClientTLS: m.o.clientTLS}
	b, err := Bootstrap(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if b.ID != 3 || !b.Lost || b.Membership.ClusterID != testCluster {
		t.Errorf("%+v", b)
	}
	other := newTestCA(t, "other").config(t, "n")
	o.ClientTLS = func() *tls.Config { return other }
	var why error
	o.Unreached = func(_ string, err error) { why = err }
	if _, err := Bootstrap(t.Context(), o); err == nil || !strings.Contains(fmt.Sprint(why), "unknown authority") {
		t.Errorf("a member of another CA has answered: %v, %v", err, why)
	}
}

func TestDiscovery(t *testing.T) {
	dns := &names{
		hosts: map[string][]string{"a.example": {"10.0.0.1"}, "b.example": {"10.0.0.2"}, "c.example": {"10.0.0.3", "10.0.0.1"}},
		srv: map[string][]*net.SRV{
			"_etcd-server-ssl._tcp.example":     {{Target: "a.example.", Port: 2380}, {Target: "b.example.", Port: 2380}, {Target: "gone.example.", Port: 2380}},
			"_etcd-server._tcp.plain":           {{Target: "b.example.", Port: 2380}, {Target: "c.example.", Port: 1234}},
			"_etcd-server-x._tcp.example":       {{Target: "b.example.", Port: 2380}},
			"_etcd-server._tcp.example":         {},
			"_etcd-server-ssl-both._tcp.many":   {{Target: "b.example.", Port: 1}},
			"_etcd-server-both._tcp.many":       {{Target: "a.example.", Port: 2}, {Target: "c.example.", Port: 3}},
			"_etcd-server._tcp.mismatch":        {{Target: "a.example.", Port: 2380}, {Target: "b.example.", Port: 2380}},
			"_etcd-server-ssl._tcp.empty.names": {},
		},
	}
	for _, x := range []struct{ domain, service, own, want, skipped, err string }{
		{"example", "", "https://a.example:2380", "n1=https://a.example:2380,0=https://b.example:2380", "gone.example", ""},
		{"example", "", "https://10.0.0.2:2380", "0=https://a.example:2380,n1=https://b.example:2380", "gone.example", ""},
		{"plain", "", "http://10.0.0.3:1234", "0=http://b.example:2380,n1=http://c.example:1234", "_etcd-server-ssl", ""},
		{"example", "x", "http://b.example:2380", "n1=http://b.example:2380", "_etcd-server-ssl-x", ""},
		{"many", "both", "http://a.example:2", "0=https://b.example:1,n1=http://a.example:2,1=http://c.example:3", "", ""},
		{"mismatch", "", "https://10.0.0.1:2380", "", "", `cannot find local etcd member "n1" in SRV records`},
		{"mismatch", "", "https://10.0.0.1:2380", "", "", "bootstrap at http://a.example:2380 from DNS for etcd-server has scheme mismatch with expected peer https://10.0.0.1:2380"},
		{"example", "", "http://c.example:9", "", "", `cannot find local etcd member "n1" in SRV records`},
		{"nowhere", "", "http://a.example:1", "", "", "error querying DNS SRV records for _etcd-server-ssl"},
		{"empty.names", "", "http://a.example:1", "", "", "no members found"},
		{"example", "", "http://none.example:1", "", "", "--initial-advertise-peer-urls"},
	} {
		d, err := Discover(t.Context(), dns, x.domain, x.service, "n1", []string{x.own})
		if x.err != "" {
			if err == nil || !strings.Contains(err.Error(), x.err) {
				t.Errorf("%s %s as %s: %v, want an error with %q", x.domain, x.service, x.own, err, x.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s %s as %s: %v", x.domain, x.service, x.own, err)
			continue
		}
		if d.InitialCluster != x.want || d.Secure != strings.Contains(x.want, "https") {
			t.Errorf("%s %s as %s: %+v, want %s", x.domain, x.service, x.own, d, x.want)
		}
		if (x.skipped == "") != (d.Skipped == nil) || x.skipped != "" && !strings.Contains(d.Skipped.Error(), x.skipped) {
			t.Errorf("%s %s as %s skipped %v", x.domain, x.service, x.own, d.Skipped)
		}
		if _, err := parseInitialCluster(d.InitialCluster); err != nil {
			t.Error(err)
		}
	}
}

func FuzzInitialCluster(f *testing.F) {
	f.Add("n1=http://a:1,n1=http://b:2,n2=unix://x")
	f.Add("=,==http://x:1")
	f.Fuzz(func(t *testing.T, s string) {
		all, err := parseInitialCluster(s)
		if err != nil {
			return
		}
		for name, urls := range all {
			if len(urls) == 0 {
				t.Fatalf("%q has no URL in %q", name, s)
			}
			for _, u := range urls {
				if _, err := targetOf(u); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}
