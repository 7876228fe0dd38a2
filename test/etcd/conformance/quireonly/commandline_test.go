package quireonly

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
)

// run runs quire to its end.
func run(t *testing.T, env []string, args ...string) (code int, output string) {
	t.Helper()
	p := start.Run(t, env, args...)
	code, err := p.Wait(20 * time.Second)
	if err != nil {
		t.Fatal(err)
	}
	return code, p.Output()
}

// serve starts quire with exactly these arguments and connects to address.
func serve(t *testing.T, env []string, address string, args ...string) (*start.Process, pb.KVClient) {
	t.Helper()
	p := start.Run(t, env, args...)
	if err := p.WaitReady(30 * time.Second); err != nil {
		t.Fatalf("%v\n%s", err, p.Output())
	}
	conn, err := start.Dial(address, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return p, pb.NewKVClient(conn)
}

// dataFlags give a quire a new data directory, and a database that stands for it where the data is not there.
func dataFlags(t *testing.T) []string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "d")
	return append([]string{"--data-dir=" + dir}, start.StorageFlags(t, dir)...)
}

func TestVersionIsPrintedAsEtcdDoes(t *testing.T) {
	t.Parallel()
	code, output := run(t, nil, "--version")
	lines := strings.Split(output, "\n")
	if code != 0 || !strings.HasPrefix(lines[0], "etcd Version: 3.") {
		t.Errorf("--version ends with %d and begins with %q", code, lines[0])
	}
	for i, prefix := range []string{"etcd Version: ", "Git SHA: ", "Go Version: go", "Go OS/Arch: "} {
		if i >= len(lines) || !strings.HasPrefix(lines[i], prefix) {
			t.Errorf("line %d of --version does not begin with %q:\n%s", i, prefix, output)
		}
	}
}

func TestWhatCannotBeMeantIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"an unknown flag":          {[]string{"--no-such-flag"}, "no-such-flag"},
		"a number that is none":    {[]string{"--max-txn-ops=many"}, "max-txn-ops"},
		"an unknown command":       {[]string{"sreve"}, "sreve"},
		"a URL that is none":       {[]string{"--listen-client-urls=127.0.0.1:2379"}, "listen-client-urls"},
		"an unknown storage":       {[]string{"--storage=mongodb://x"}, "storage"},
		"an unknown log level":     {[]string{"--log-level=loud"}, "log-level"},
		"an unknown mode":          {[]string{"--auto-compaction-mode=sometimes"}, "auto-compaction"},
		"a missing config file":    {[]string{"--config-file=/does/not/exist.yml"}, "/does/not/exist.yml"},
		"a certificate not there":  {[]string{"--listen-client-urls=https://127.0.0.1:0", "--advertise-client-urls=https://127.0.0.1:0", "--cert-file=/does/not/exist.pem", "--key-file=/does/not/exist.key"}, "/does/not/exist"},
		"https without a key pair": {[]string{"--listen-client-urls=https://127.0.0.1:0", "--advertise-client-urls=https://127.0.0.1:0"}, "key"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code, output := run(t, nil, append([]string{"--data-dir=" + filepath.Join(t.TempDir(), "d")}, c.args...)...)
			if name == "an unknown command" {
				code, output = run(t, nil, c.args...)
			}
			if code != 1 && code != 2 {
				t.Errorf("the exit status is %d, want 1 or 2", code)
			}
			if !strings.Contains(output, c.says) {
				t.Errorf("the output does not name %q:\n%s", c.says, output)
			}
			if strings.Contains(output, "goroutine ") {
				t.Errorf("quire panicked:\n%s", output)
			}
		})
	}
}

// etcd's own tests and kubeadm always give the flags of a cluster, for one node as well.
func TestTheFlagsOfAOneMemberEtcdAreTaken(t *testing.T) {
	t.Parallel()
	a, peer := ports.FreeAddress(t), ports.FreeAddress(t)
	p, kv := serve(t, []string{"ETCD_UNSUPPORTED_ARCH=arm64", "ETCD_VERIFY=all", "ETCD_NO_SUCH_SETTING=1"}, a, append(dataFlags(t),
		"--name", "node-1",
		"--listen-client-urls", "http://"+a, "--advertise-client-urls", "http://"+a,
		"--listen-peer-urls=http://"+peer, "--initial-advertise-peer-urls=http://"+peer,
		"--initial-cluster=node-1=http://"+peer, "--initial-cluster-state=new", "--initial-cluster-token=new",
		"--snapshot-count=10000", "--heartbeat-interval=100", "--election-timeout=1000", "--strict-reconfig-check=false",
		"--pre-vote", "--logger=zap", "--log-outputs=stderr", "--max-snapshots=5", "--max-wals", "5", "--snapshot-catchup-entries=1000")...,
	)
	r, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte("a")})
	if err != nil {
		t.Fatal(err)
	}
	if r.Header.Revision != 2 {
		t.Errorf("the first write made revision %d", r.Header.Revision)
	}
	if p.Lines(`"snapshot-catchup-entries":1000`) == nil {
		t.Errorf("the start is not logged with its settings:\n%s", p.Output())
	}
	conn, err := start.Dial(a, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	m, err := pb.NewClusterClient(conn).MemberList(t.Context(), &pb.MemberListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Members) != 1 || m.Members[0].Name != "node-1" || len(m.Members[0].PeerURLs) != 1 || m.Members[0].PeerURLs[0] != "http://"+peer {
		t.Errorf("members are %v", m.Members)
	}
}

func TestEveryLogLineIsJSONWithEtcdsFields(t *testing.T) {
	t.Parallel()
	a := ports.FreeAddress(t)
	p, kv := serve(t, nil, a, append(dataFlags(t), "--listen-client-urls=http://"+a, "--advertise-client-urls=http://"+a, "--log-level=debug")...)
	const secret = "value-that-nobody-may-see"
	if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte("a"), Value: []byte(secret)}); err != nil {
		t.Fatal(err)
	}
	if _, err := kv.Txn(t.Context(), &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte("a"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte(secret)}}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("b"), Value: []byte(secret)}}}},
	}); err != nil {
		t.Fatal(err)
	}
	if code, err := p.Stop(20 * time.Second); err != nil || code != 0 {
		t.Fatalf("ended with %d, %v", code, err)
	}
	output := p.Output()
	for line := range strings.Lines(output) {
		var fields map[string]any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatalf("a log line is not JSON: %q", line)
		}
		for _, f := range []string{"level", "ts", "caller", "msg"} {
			if _, ok := fields[f]; !ok {
				t.Fatalf("a log line has no %s: %s", f, line)
			}
		}
		if fields["level"] == "error" {
			t.Errorf("an error in a normal run: %s", line)
		}
	}
	if strings.Contains(output, secret) {
		t.Error("a value is in the log")
	}
}

func TestFlagsBeatTheEnvironmentAndAConfigFileStandsAlone(t *testing.T) {
	aboutFiles(t)
	t.Parallel()
	tooMany := &pb.TxnRequest{}
	for i := range 4 {
		tooMany.Success = append(tooMany.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: fmt.Append(nil, i)}}})
	}
	limit := func(kv pb.KVClient) (refused bool) {
		t.Helper()
		_, err := kv.Txn(t.Context(), tooMany)
		if err != nil && status.Convert(err).Message() != status.Convert(rpctypes.ErrGRPCTooManyOps).Message() {
			t.Fatal(err)
		}
		return err != nil
	}
	env := func(a string) []string {
		return []string{"ETCD_DATA_DIR=" + filepath.Join(t.TempDir(), "d"), "ETCD_LISTEN_CLIENT_URLS=http://" + a, "ETCD_ADVERTISE_CLIENT_URLS=http://" + a, "ETCD_MAX_TXN_OPS=3"}
	}
	a := ports.FreeAddress(t)
	if _, kv := serve(t, env(a), a); !limit(kv) {
		t.Error("ETCD_MAX_TXN_OPS=3 was not heard")
	}
	a = ports.FreeAddress(t)
	if _, kv := serve(t, env(a), a, "--max-txn-ops=4"); limit(kv) {
		t.Error("the flag did not beat the variable")
	}
	a = ports.FreeAddress(t)
	file := filepath.Join(t.TempDir(), "etcd.yml")
	text := fmt.Sprintf("name: from-file\ndata-dir: %s\nlisten-client-urls: http://%s\nadvertise-client-urls: http://%s\nmax-txn-ops: 3\nunknown-key: 1\n", filepath.Join(t.TempDir(), "d"), a, a)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, kv := serve(t, []string{"ETCD_MAX_TXN_OPS=100"}, a, "--config-file="+file, "--max-txn-ops=100"); !limit(kv) {
		t.Error("a flag or a variable counted beside the config file")
	}
}

func TestStorageNamesTheDatabaseFile(t *testing.T) {
	aboutFiles(t)
	t.Parallel()
	a := ports.FreeAddress(t)
	path := filepath.Join(t.TempDir(), "deep", "er", "my.db")
	p, kv := serve(t, nil, a, "--data-dir="+filepath.Join(t.TempDir(), "d"), "--storage=sqlite://"+path, "--listen-client-urls=http://"+a, "--advertise-client-urls=http://"+a)
	if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte("a")}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	if p.Lines(path) == nil {
		t.Errorf("the log does not say where the data lies:\n%s", p.Output())
	}
}

func TestMetricsHaveAListenerOfTheirOwn(t *testing.T) {
	t.Parallel()
	a, m := ports.FreeAddress(t), ports.FreeAddress(t)
	serve(t, nil, a, append(dataFlags(t), "--listen-client-urls=http://"+a, "--advertise-client-urls=http://"+a, "--listen-metrics-urls=http://"+m)...)
	for path, want := range map[string]string{"/metrics": "etcd_server_version", "/health": `"health":"true"`, "/readyz": "ok", "/livez": "ok"} {
		r, err := http.Get("http://" + m + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if r.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("GET %s on the metrics listener: %d, without %q", path, r.StatusCode, want)
		}
	}
}

func TestAUnixSocketServesClients(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "s")
	p := start.Run(t, nil, append(dataFlags(t), "--listen-client-urls=unix://"+socket, "--advertise-client-urls=unix://"+socket)...)
	if err := p.WaitReady(30 * time.Second); err != nil {
		t.Fatalf("%v\n%s", err, p.Output())
	}
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// Open streams must not hold up the end.
func TestAnOperatorStopsQuireWhileClientsWatch(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			s := start.Quire(t, start.Options{})
			for range 5 {
				w, err := s.Watch.Watch(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				if err := w.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("a")}}}); err != nil {
					t.Fatal(err)
				}
				if _, err := w.Recv(); err != nil {
					t.Fatal(err)
				}
			}
			began := time.Now()
			stop(t, s, sig)
			if d := time.Since(began); d > 5*time.Second {
				t.Errorf("the end took %v", d)
			}
		})
	}
}
