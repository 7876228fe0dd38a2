package k8s

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/quire-db/quire/test/ports"
)

const (
	eventTTL           = 15 * time.Second
	compactionInterval = 30 * time.Second
	consistencyPeriod  = 15 * time.Second

	adminToken = "admin-token-of-the-test"
)

// controlPlane is one store and one kube-apiserver on top of it, with clients
// that are allowed everything. Several of them may share what is in storage.
type controlPlane struct {
	name      string // of the store
	number    int    // from 1, where there are several
	dir       string
	authority *authority

	storeBinary  string
	storage      string // the store's --storage; "" and onlyMember are its data directory
	storeAddress string // host:port of its client URL
	store        *process

	apiserverBinary  string
	apiserverAddress string
	apiserver        *process

	http       *http.Client // trusts the authority and shows the client certificate
	config     *rest.Config
	typed      kubernetes.Interface
	dynamic    dynamic.Interface
	extensions apiextensions.Interface
}

// startControlPlane starts both processes, on the storage that $QUIRE_STORAGE
// names, and waits until the API server says that it is ready.
func startControlPlane(t *testing.T) *controlPlane {
	t.Helper()
	cp := newControlPlane(t, "k8s", 1, newControlPlaneAuthority(t), storageOfTest(t))
	cp.startStore(t)
	cp.startAPIServer(t)
	return cp
}

// newControlPlaneAuthority issues what the processes of all control planes
// have in common, so that a token of one is good for the others.
func newControlPlaneAuthority(t *testing.T) *authority {
	t.Helper()
	a := newAuthority(t, t.TempDir())
	a.issue(t, "store")
	a.issue(t, "apiserver")
	a.issue(t, "client")
	a.issueKeyPair(t, "service-account")
	return a
}

// newControlPlane makes the clients; nothing runs yet. Both processes are gone
// when the test has ended; when it failed, the ends of their logs are in the
// test's output.
func newControlPlane(t *testing.T, name string, number int, authority *authority, storage string) *controlPlane {
	t.Helper()
	cp := &controlPlane{
		name:             name,
		number:           number,
		dir:              t.TempDir(),
		authority:        authority,
		storeBinary:      binary(t, "QUIRE_TEST_SERVER", "bin/quire"),
		storage:          storage,
		apiserverBinary:  binary(t, "QUIRE_TEST_APISERVER", "bin/peers/kube-apiserver"),
		storeAddress:     ports.FreeAddress(t),
		apiserverAddress: ports.FreeAddress(t),
	}
	cp.http = cp.newHTTPClient(t)
	t.Cleanup(func() {
		for _, p := range []*process{cp.apiserver, cp.store} {
			if p == nil {
				continue
			}
			p.kill()
			if t.Failed() {
				t.Log(p.tail(80))
			}
		}
	})
	cp.config = &rest.Config{
		Host:            "https://" + cp.apiserverAddress,
		BearerToken:     adminToken,
		TLSClientConfig: rest.TLSClientConfig{CAFile: cp.authority.file("ca.crt")},
		QPS:             -1, // the test is the load; the client must not hold it back
	}
	var err error
	if cp.typed, err = kubernetes.NewForConfig(cp.config); err != nil {
		t.Fatal(err)
	}
	if cp.dynamic, err = dynamic.NewForConfig(cp.config); err != nil {
		t.Fatal(err)
	}
	if cp.extensions, err = apiextensions.NewForConfig(cp.config); err != nil {
		t.Fatal(err)
	}
	return cp
}

func (cp *controlPlane) isEtcd() bool { return filepath.Base(cp.storeBinary) == "etcd" }

// startStore starts the store on its data directory, for the first time or
// again, and waits until it reports that it is healthy.
func (cp *controlPlane) startStore(t *testing.T) {
	t.Helper()
	client := "https://" + cp.storeAddress
	// etcd listens for peers even when it is alone, as does a quire that is a
	// member; any other takes the flags and does nothing with them.
	peer := "http://" + ports.FreeAddress(t)
	arguments := []string{
		"--name=" + cp.name,
		"--data-dir=" + cp.storeDataDir(),
		"--listen-client-urls=" + client,
		"--advertise-client-urls=" + client,
		"--listen-peer-urls=" + peer,
		"--initial-advertise-peer-urls=" + peer,
		"--cert-file=" + cp.authority.file("store.crt"),
		"--key-file=" + cp.authority.file("store.key"),
		"--trusted-ca-file=" + cp.authority.file("ca.crt"),
		"--client-cert-auth",
	}
	switch {
	case cp.isEtcd() || cp.storage == onlyMember:
		arguments = append(arguments, "--initial-cluster="+cp.name+"="+peer)
	case cp.storage != "":
		arguments = append(arguments, "--storage="+cp.storage)
	}
	cp.store = startProcess(t, cp.name, filepath.Join(cp.dir, "store.log"), cp.storeBinary, nil, arguments)
	cp.waitFor200(t, cp.store, client+"/health", 30*time.Second)
}

func (cp *controlPlane) storeDataDir() string { return filepath.Join(cp.dir, "data") }

// killStore ends the store as a power cut would, as far as the process is
// concerned: it gets no chance to write anything more.
func (cp *controlPlane) killStore(t *testing.T) {
	t.Helper()
	cp.store.signal(t, syscall.SIGKILL, 10*time.Second)
}

// startAPIServer starts the API server on its store and waits until it says
// that it is ready.
func (cp *controlPlane) startAPIServer(t *testing.T) {
	t.Helper()
	cp.launchAPIServer(t, cp)
	cp.waitForAPIServer(t)
}

// launchAPIServer starts the API server on the stores of these control planes.
func (cp *controlPlane) launchAPIServer(t *testing.T, stores ...*controlPlane) {
	t.Helper()
	var servers []string
	for _, s := range stores {
		servers = append(servers, "https://"+s.storeAddress)
	}
	tokens := filepath.Join(cp.dir, "tokens.csv")
	if err := os.WriteFile(tokens, []byte(adminToken+`,admin,admin,"system:masters"`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	host, port := "127.0.0.1", cp.apiserverAddress[len("127.0.0.1:"):]
	cp.apiserver = startProcess(t, "kube-apiserver of "+cp.name, filepath.Join(cp.dir, "kube-apiserver.log"), cp.apiserverBinary,
		[]string{
			"KUBE_WATCHCACHE_CONSISTENCY_CHECKER=true",
			"QUIRE_TEST_CONSISTENCY_PERIOD=" + consistencyPeriod.String(),
		},
		[]string{
			"--etcd-servers=" + strings.Join(servers, ","),
			"--etcd-cafile=" + cp.authority.file("ca.crt"),
			"--etcd-certfile=" + cp.authority.file("client.crt"),
			"--etcd-keyfile=" + cp.authority.file("client.key"),
			"--etcd-compaction-interval=" + compactionInterval.String(),
			"--event-ttl=" + eventTTL.String(),
			"--watch-cache-sizes=configmaps#0", // see the package doc
			"--bind-address=" + host,
			"--secure-port=" + port,
			fmt.Sprintf("--advertise-address=192.0.2.%d", cp.number), // must not be loopback; nobody connects to it
			"--tls-cert-file=" + cp.authority.file("apiserver.crt"),
			"--tls-private-key-file=" + cp.authority.file("apiserver.key"),
			"--token-auth-file=" + tokens,
			"--authorization-mode=RBAC",
			"--service-account-issuer=https://kubernetes.default.svc",
			"--service-account-key-file=" + cp.authority.file("service-account.pub"),
			"--service-account-signing-key-file=" + cp.authority.file("service-account.key"),
			"--service-cluster-ip-range=10.0.0.0/24",
			"--disable-admission-plugins=ServiceAccount", // wants controllers that do not run here
			"--v=1",
		})
}

func (cp *controlPlane) waitForAPIServer(t *testing.T) {
	t.Helper()
	cp.waitFor200(t, cp.apiserver, cp.apiserverURL("/readyz"), 2*time.Minute)
}

func (cp *controlPlane) apiserverURL(path string) string {
	return "https://" + cp.apiserverAddress + path
}

func (cp *controlPlane) newHTTPClient(t *testing.T) *http.Client {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(cp.authority.file("client.crt"), cp.authority.file("client.key"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cp.authority.certificate)
	return &http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}},
	}
}

// get asks one of the two servers over HTTP, as the administrator.
func (cp *controlPlane) get(ctx context.Context, url string) (status int, body string, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	request.Header.Set("Authorization", "Bearer "+adminToken)
	response, err := cp.http.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return response.StatusCode, string(bytes.TrimSpace(text)), err
}

// waitFor200 asks p for url until it answers with status 200.
func (cp *controlPlane) waitFor200(t *testing.T, p *process, url string, within time.Duration) {
	t.Helper()
	var last string
	eventually(t, within, func() (bool, string) {
		if !p.running() {
			t.Fatalf("%s ended while it was starting: %v\n%s", p.name, p.cmd.ProcessState, p.tail(40))
		}
		status, body, err := cp.get(t.Context(), url)
		if err != nil {
			last = err.Error()
		} else {
			last = fmt.Sprintf("status %d: %s", status, body)
		}
		return err == nil && status == http.StatusOK, url + " did not become healthy: " + last
	})
}

// eventually calls done until it returns true. After the time it ends the
// test with the reason that done returned last.
func eventually(t *testing.T, within time.Duration, done func() (ok bool, reason string)) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		ok, reason := done()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, reason)
		}
		time.Sleep(50 * time.Millisecond) // between two looks at another process
	}
}
