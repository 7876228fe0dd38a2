package sqlraft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Discovered is what DNS says of a cluster.
type Discovered struct {
	// InitialCluster is for BootstrapOptions. Members other than this one are called 0, 1, …
	InitialCluster string
	// Secure: there are https URLs. Unless certificates are checked against a CA of the cluster's own, they must bear the
	// domain's name, as in etcd: give it to the TLS configuration as ServerName.
	Secure bool
	// Skipped are records that were of no use; nothing is wrong with the others.
	Skipped error
}

// Discover reads the SRV records _etcd-server-ssl._tcp and _etcd-server._tcp of domain, --discovery-srv; with a
// service, --discovery-srv-name, -<service> follows both names. The record of the member called name is the one that
// leads to one of its peerURLs.
func Discover(ctx context.Context, r Resolver, domain, service, name string, peerURLs []string) (*Discovered, error) {
	if r == nil {
		r = net.DefaultResolver
	}
	own := map[string]string{} // scheme by address
	for _, s := range peerURLs {
		u, err := url.Parse(s)
		if err != nil {
			return nil, err
		}
		addresses, err := addressesOf(ctx, r, u.Host)
		if err != nil {
			return nil, fmt.Errorf("--initial-advertise-peer-urls %s: %w", s, err)
		}
		for _, a := range addresses {
			own[a] = u.Scheme
		}
	}
	if service != "" {
		service = "-" + service
	}
	d := &Discovered{}
	var entries []string
	var skipped []error
	others := 0
	for _, kind := range [...]struct{ scheme, service string }{{"https", "etcd-server-ssl"}, {"http", "etcd-server"}} {
		_, records, err := r.LookupSRV(ctx, kind.service+service, "tcp", domain)
		if err != nil {
			skipped = append(skipped, fmt.Errorf("error querying DNS SRV records for _%s%s %w", kind.service, service, err))
			continue
		}
		for _, record := range records {
			port := strconv.Itoa(int(record.Port))
			addresses, err := addressesOf(ctx, r, net.JoinHostPort(record.Target, port))
			if err != nil {
				skipped = append(skipped, err)
				continue
			}
			found := kind.scheme + "://" + net.JoinHostPort(strings.TrimSuffix(record.Target, "."), port)
			member := strconv.Itoa(others)
			if i := slices.IndexFunc(addresses, func(a string) bool { return own[a] != "" }); i < 0 {
				others++
			} else if member = name; own[addresses[i]] != kind.scheme {
				skipped = append(skipped, fmt.Errorf("bootstrap at %s from DNS for %s%s has scheme mismatch with expected peer %s://%s",
					found, kind.service, service, own[addresses[i]], addresses[i]))
				continue
			}
			entries = append(entries, member+"="+found)
			d.Secure = d.Secure || kind.scheme == "https"
		}
	}
	d.Skipped = errors.Join(skipped...)
	if len(entries) == 0 {
		return nil, errors.Join(fmt.Errorf("--discovery-srv %s: no members found", domain), d.Skipped)
	}
	if !slices.ContainsFunc(entries, func(e string) bool { return strings.HasPrefix(e, name+"=") }) {
		return nil, errors.Join(fmt.Errorf("cannot find local etcd member %q in SRV records; they are %s", name, strings.Join(entries, ",")), d.Skipped)
	}
	d.InitialCluster = strings.Join(entries, ",")
	return d, nil
}

// addressesOf returns all addresses that host:port has, as text.
func addressesOf(ctx context.Context, r Resolver, hostport string) ([]string, error) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	if ip := net.ParseIP(host); ip != nil {
		return []string{net.JoinHostPort(ip.String(), port)}, nil
	}
	found, err := r.LookupIPAddr(ctx, host)
	if err != nil {
		return nil, err
	}
	all := make([]string, len(found))
	for i, a := range found {
		all[i] = net.JoinHostPort(a.String(), port)
	}
	return all, nil
}
