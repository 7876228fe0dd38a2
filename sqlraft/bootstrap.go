package sqlraft

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/quire-db/quire/backend"
)

// BootstrapOptions are what the flags say to a member that starts for the first time.
type BootstrapOptions struct {
	Name           string
	InitialCluster string // as the flag, or as Discover has found it
	Existing       bool   // --initial-cluster-state existing
	Token          string // only for a new cluster
	PeerURLs       []string
	MaxLearners    int

	ClientTLS func() *tls.Config // for https and unixs peers; nil: there are none
	LocalAddr net.IP             // nil: the system's choice
	Resolver  Resolver           // nil: the system's
	Timeout   time.Duration      // until the others have answered; 0: 10 s to join a cluster, 1 s otherwise, as in etcd
	// Unreached is told who has not answered, and why. It may be nil.
	Unreached func(peerURL string, err error)
}

// Resolver is the part of *net.Resolver that is needed.
type Resolver interface {
	LookupSRV(ctx context.Context, service, proto, name string) (cname string, records []*net.SRV, err error)
	LookupIPAddr(ctx context.Context, host string) ([]net.IPAddr, error)
}

// Bootstrapped is what a member is to begin with.
type Bootstrapped struct {
	ID uint64
	// Membership is that of a new cluster. When joining, it is what another member has answered, and good for dialling:
	// what counts comes with the log.
	Membership backend.Membership
	// Joining: the member belongs to a cluster that exists.
	Joining bool
	// Lost: the cluster knows this member as one that was started before. It may have acknowledged entries and given
	// votes that it does not have any more.
	Lost bool
}

// errTooManyLearners has etcd's text.
var errTooManyLearners = errors.New("membership: too many learner members in cluster")

// Bootstrap finds out who a member without data is and who else belongs to its cluster. It is not to be called when
// there is a log: then that says so, and the flags mean nothing any more. Texts of errors are etcd's
// (server/v3/config: VerifyBootstrap; server/v3/etcdserver: bootstrapNewClusterNoWAL, bootstrapExistingClusterNoWAL).
func Bootstrap(ctx context.Context, o BootstrapOptions) (*Bootstrapped, error) {
	if o.Resolver == nil {
		o.Resolver = net.DefaultResolver
	}
	if o.Unreached == nil {
		o.Unreached = func(string, error) {}
	}
	initial, err := parseInitialCluster(o.InitialCluster)
	if err != nil {
		return nil, fmt.Errorf("--initial-cluster: %w", err)
	}
	own := initial[o.Name]
	if own == nil {
		return nil, fmt.Errorf("couldn't find local name %q in the initial cluster configuration", o.Name)
	}
	if !o.Existing {
		if err := advertiseMatches(ctx, &o, own); err != nil {
			return nil, err
		}
	}
	if hasDuplicates(initial) {
		return nil, fmt.Errorf("initial cluster %s has duplicate url", formatInitialCluster(initial))
	}
	var others []string
	for name, urls := range initial {
		if name != o.Name {
			others = append(others, urls...)
		}
	}
	slices.Sort(others)
	if o.Existing {
		return joinCluster(ctx, &o, initial, others)
	}
	return newCluster(ctx, &o, initial, others)
}

func newCluster(ctx context.Context, o *BootstrapOptions, initial map[string][]string, others []string) (*Bootstrapped, error) {
	b := &Bootstrapped{ID: MemberID(initial[o.Name], o.Token)}
	var ids []uint64
	for name, urls := range initial {
		m := backend.Member{ID: MemberID(urls, o.Token), Name: name, PeerURLs: urls}
		b.Membership.Members = append(b.Membership.Members, m)
		ids = append(ids, m.ID)
	}
	sortByID(b.Membership.Members)
	b.Membership.ClusterID = ClusterID(ids)
	// A member that has lost its data must not found the cluster a second time. Those that start along with it do not
	// answer yet, or know of no client URLs.
	for _, answer := range askMembers(ctx, o, others, cmp.Or(o.Timeout, time.Second)) {
		if started(answer.Members, b.ID) {
			return nil, fmt.Errorf("member %x has already been bootstrapped; it has no data any more: start it once with --initial-cluster-state existing, and it joins again", b.ID)
		}
	}
	return b, nil
}

func joinCluster(ctx context.Context, o *BootstrapOptions, initial map[string][]string, others []string) (*Bootstrapped, error) {
	answers := askMembers(ctx, o, others, cmp.Or(o.Timeout, 10*time.Second))
	if len(answers) == 0 {
		return nil, errors.New("cannot fetch cluster info from peer urls: could not retrieve cluster information from the given URLs; is the cluster of --initial-cluster running?")
	}
	// Members that lag may not know yet that this one was added.
	var found *Bootstrapped
	var failed error
	for _, m := range answers {
		id, err := matchMembers(ctx, o, initial, m.Members)
		if err == nil && len(learnersOf(m)) > o.MaxLearners {
			err = errTooManyLearners
		}
		if err != nil {
			failed = cmp.Or(failed, err)
			continue
		}
		if found != nil && (found.ID != id || found.Membership.ClusterID != m.ClusterID) {
			return nil, fmt.Errorf("the members of --initial-cluster %s belong to clusters %x and %x", o.InitialCluster, found.Membership.ClusterID, m.ClusterID)
		}
		if found == nil {
			found = &Bootstrapped{ID: id, Membership: m, Joining: true}
		}
		if started(m.Members, id) {
			found.Membership, found.Lost = m, true
		}
	}
	if found == nil {
		return nil, failed
	}
	return found, nil
}

// started tells whether a member has told its client URLs, which each does as soon as it takes part. Names do not tell:
// the first members have theirs from the flags.
func started(members []backend.Member, id uint64) bool {
	return slices.ContainsFunc(members, func(m backend.Member) bool { return m.ID == id && len(m.ClientURLs) > 0 })
}

// matchMembers finds for each member one in initial with the same URLs, and returns the id of this one.
func matchMembers(ctx context.Context, o *BootstrapOptions, initial map[string][]string, members []backend.Member) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	fail := func(err error) (uint64, error) {
		list := make([]string, len(members))
		for i, m := range members {
			list[i] = fmt.Sprintf("%x=%s", m.ID, strings.Join(m.PeerURLs, ","))
		}
		return 0, fmt.Errorf("error validating peerURLs {%s}: %w; --initial-cluster must list exactly the members of the cluster, this one included", strings.Join(list, " "), err)
	}
	if len(members) != len(initial) {
		return fail(errors.New("member count is unequal"))
	}
	var id uint64
	for _, m := range members {
		name, last := "", error(nil)
		// By their texts first: a name that cannot be looked up must not stand in the way of others.
		for _, r := range []Resolver{nil, o.Resolver} {
			for _, n := range slices.Sorted(maps.Keys(initial)) {
				if name != "" {
					break
				}
				if last = sameURLs(ctx, r, m.PeerURLs, initial[n]); last == nil {
					name = n
				}
			}
		}
		if name == o.Name {
			id = m.ID
		}
		if name == "" {
			return fail(fmt.Errorf("PeerURLs: no match found for existing member (%x, %v), last resolver error (%w)", m.ID, m.PeerURLs, last))
		}
	}
	if id == 0 {
		return fail(fmt.Errorf("PeerURLs: no existing member has those of %q", o.Name))
	}
	return id, nil
}

// askMembers asks all URLs at once who the members are, and returns the answers in the order of the URLs. It does not
// wait longer than a second for the others when one has answered.
func askMembers(ctx context.Context, o *BootstrapOptions, urls []string, timeout time.Duration) []backend.Membership {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	client := (&dialer{tls: o.ClientTLS, localAddr: o.LocalAddr, timeout: timeout}).httpClient()
	defer client.CloseIdleConnections()
	type answer struct {
		at int
		m  backend.Membership
		error
	}
	answers := make(chan answer, len(urls))
	for i, u := range urls {
		go func() {
			m, err := getMembers(ctx, client, u)
			answers <- answer{i, m, err}
		}()
	}
	got := make([]*backend.Membership, len(urls))
	for range urls {
		a := <-answers // all end with ctx
		if a.error != nil {
			o.Unreached(urls[a.at], a.error)
			continue
		}
		got[a.at] = &a.m
		timer := time.AfterFunc(time.Second, cancel)
		defer timer.Stop()
	}
	var all []backend.Membership
	for _, m := range got {
		if m != nil {
			all = append(all, *m)
		}
	}
	return all
}

// getMembers is GET /members.
func getMembers(ctx context.Context, client *http.Client, peerURL string) (backend.Membership, error) {
	var m backend.Membership
	target, err := httpURL(peerURL, membersPath)
	if err != nil {
		return m, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return m, err
	}
	r.Host = "peer"
	answer, err := client.Do(r)
	if err != nil {
		return m, err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxRequestBody))
	if err != nil {
		return m, err
	}
	if answer.StatusCode != http.StatusOK {
		return m, fmt.Errorf("GET %s: %s: %s", membersPath, answer.Status, strings.TrimSpace(string(body[:min(len(body), 200)])))
	}
	if err := json.Unmarshal(body, &m.Members); err != nil {
		return m, fmt.Errorf("GET %s: %w", membersPath, err)
	}
	if m.ClusterID, err = parseID(answer.Header.Get(headerCluster)); err != nil {
		return m, fmt.Errorf("GET %s: %s: %w", membersPath, headerCluster, err)
	}
	if len(m.Members) == 0 || m.ClusterID == 0 {
		return m, fmt.Errorf("GET %s: the cluster %x has %d members", membersPath, m.ClusterID, len(m.Members))
	}
	sortByID(m.Members)
	return m, nil
}

func sortByID(members []backend.Member) {
	slices.SortFunc(members, func(a, b backend.Member) int { return cmp.Compare(a.ID, b.ID) })
}

// parseInitialCluster reads "n1=url,n1=url2,n2=url". Each member's URLs are sorted.
func parseInitialCluster(s string) (map[string][]string, error) {
	all := map[string][]string{}
	for entry := range strings.SplitSeq(s, ",") {
		if entry == "" {
			continue
		}
		name, u, _ := strings.Cut(entry, "=")
		parsed, err := parsePeerURL(u)
		if err != nil {
			return nil, err
		}
		all[name] = append(all[name], parsed)
	}
	for _, urls := range all {
		slices.Sort(urls)
	}
	return all, nil
}

func formatInitialCluster(all map[string][]string) string {
	var pairs []string
	for name, urls := range all {
		for _, u := range urls {
			pairs = append(pairs, name+"="+u)
		}
	}
	slices.Sort(pairs)
	return strings.Join(pairs, ",")
}

// parsePeerURL checks what etcd checks, with its texts (client/pkg/v3/types: NewURLs).
func parsePeerURL(in string) (string, error) {
	in = strings.TrimSpace(in)
	u, err := url.Parse(in)
	if err != nil {
		return "", err
	}
	switch u.Scheme {
	case "http", "https":
		if _, _, err := net.SplitHostPort(u.Host); err != nil {
			return "", fmt.Errorf(`URL address does not have the form "host:port": %s`, in)
		}
		if u.Path != "" {
			return "", fmt.Errorf("URL must not contain a path: %s", in)
		}
	case "unix", "unixs":
		if u.Host+u.Path == "" {
			return "", fmt.Errorf("URL names no socket file: %s", in)
		}
	default:
		return "", fmt.Errorf("URL scheme must be http, https, unix, or unixs: %s", in)
	}
	return u.String(), nil
}

func hasDuplicates(all map[string][]string) bool {
	seen := map[string]bool{}
	for _, urls := range all {
		for _, u := range urls {
			if seen[u] {
				return true
			}
			seen[u] = true
		}
	}
	return false
}

// advertiseMatches compares --initial-advertise-peer-urls with what --initial-cluster says of this member.
func advertiseMatches(ctx context.Context, o *BootstrapOptions, own []string) error {
	ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	err := sameURLs(ctx, o.Resolver, o.PeerURLs, own)
	if err == nil {
		return nil
	}
	advertised := slices.Sorted(slices.Values(o.PeerURLs))
	pairs := func(urls []string) string {
		return formatInitialCluster(map[string][]string{o.Name: urls})
	}
	without := func(urls, these []string) (rest []string) {
		for _, u := range urls {
			if !slices.Contains(these, u) {
				rest = append(rest, u)
			}
		}
		return rest
	}
	if missing := without(own, advertised); len(missing) > 0 {
		return fmt.Errorf("--initial-cluster has %s but missing from --initial-advertise-peer-urls=%s (%w)", pairs(missing), strings.Join(advertised, ","), err)
	}
	if missing := without(advertised, own); len(missing) > 0 {
		return fmt.Errorf("--initial-advertise-peer-urls has %s but missing from --initial-cluster=%s", strings.Join(missing, ","), pairs(own))
	}
	return fmt.Errorf("failed to resolve %s to match --initial-cluster=%s (%w)", strings.Join(advertised, ","), pairs(own), err)
}

// resolveTimeout is how long names are looked up until they agree: in a cluster that comes up, they appear late.
const resolveTimeout = 30 * time.Second

// sameURLs returns nil when both lists lead to the same places: by their text, else by the addresses that their hosts
// have. A nil resolver compares texts only.
func sameURLs(ctx context.Context, r Resolver, a, b []string) error {
	if len(a) != len(b) {
		return fmt.Errorf("len(%q) != len(%q)", a, b)
	}
	x, err := placesOf(ctx, nil, a)
	if err != nil {
		return err
	}
	y, err := placesOf(ctx, nil, b)
	if err != nil {
		return err
	}
	if slices.Equal(x, y) {
		return nil
	}
	if r != nil {
		if x, err = placesOf(ctx, r, a); err != nil {
			return err
		}
		if y, err = placesOf(ctx, r, b); err != nil {
			return err
		}
	}
	for i := range x {
		if x[i] != y[i] {
			return fmt.Errorf("resolved urls: %q != %q", x[i], y[i])
		}
	}
	return nil
}

// placesOf writes addresses in one way, and with a resolver names as one of their addresses. The result is sorted.
func placesOf(ctx context.Context, r Resolver, urls []string) ([]string, error) {
	out := make([]string, 0, len(urls))
	for _, s := range urls {
		u, err := url.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("failed to parse string to URL: %q", s)
		}
		if u.Scheme == "http" || u.Scheme == "https" {
			if u.Host, err = placeOf(ctx, r, u.Host); err != nil {
				return nil, fmt.Errorf("failed to resolve %q (%w)", s, err)
			}
		}
		out = append(out, u.Scheme+"://"+u.Host+u.Path)
	}
	slices.Sort(out)
	return out, nil
}

// placeOf tries until ctx is done.
func placeOf(ctx context.Context, r Resolver, hostport string) (string, error) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return "", err
	}
	if ip := net.ParseIP(host); ip != nil {
		return net.JoinHostPort(ip.String(), port), nil
	}
	if r == nil || host == "localhost" {
		return hostport, nil
	}
	for {
		found, err := r.LookupIPAddr(ctx, host)
		if err == nil && len(found) > 0 {
			addresses := make([]string, len(found))
			for i, a := range found {
				addresses[i] = a.String()
			}
			// The same one, whatever order the resolver has them in.
			return net.JoinHostPort(slices.Min(addresses), port), nil
		}
		select {
		case <-ctx.Done():
			return "", cmp.Or(err, ctx.Err())
		case <-time.After(time.Second):
		}
	}
}
