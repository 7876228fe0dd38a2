package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"database/sql"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "modernc.org/sqlite"

	"github.com/quire-db/quire/test/ports"
)

func TestVersionIsInEtcdsForm(t *testing.T) {
	form := regexp.MustCompile(`^etcd Version: 3\.8\.0-alpha\.0\nGit SHA: .+\nGo Version: go.+\nGo OS/Arch: \w+/\w+\nquire Version: .+\n$`)
	for _, args := range [][]string{
		{"--version", "--etcd-version=3.8.0-alpha.0"}, {"-version", "-etcd-version", "3.8.0-alpha.0"}, {"version", "--etcd-version=3.8.0-alpha.0"},
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), args, nil, &out, &errs); code != 0 || !form.Match(out.Bytes()) || errs.Len() > 0 {
			t.Errorf("%v: exit code %d, %q, %q", args, code, &out, &errs)
		}
	}
}

func TestExitCodes(t *testing.T) {
	dir := t.TempDir()
	for _, x := range []struct {
		args []string
		code int
		text string // on stderr
	}{
		{[]string{"--help"}, 0, ""},
		{[]string{"help"}, 0, ""},
		{[]string{"-h"}, 0, ""},
		{[]string{"--no-such-flag"}, 2, "unknown flag: --no-such-flag"},
		{[]string{"serve"}, 2, `"serve" is not a valid flag`},
		{[]string{"--quota-backend-bytes=much"}, 2, "--quota-backend-bytes"},
		{[]string{"--listen-client-urls=http://example.com:1"}, 1, "expected IP in URL for binding"},
		{[]string{"--log-outputs=" + filepath.Join(dir, "no", "such", "file")}, 1, "--log-outputs"},
		{[]string{"--listen-metrics-urls=https://127.0.0.1:0", "--data-dir=" + dir}, 1, errNoMetricsTLS.Error()},
		{[]string{"check", "--data-dir=" + dir}, 1, "there is no database at"},
		{[]string{"check", "--storage=nonsense"}, 1, "has no scheme"},
	} {
		var out, errs bytes.Buffer
		if code := run(t.Context(), x.args, nil, &out, &errs); code != x.code || !strings.Contains(errs.String(), x.text) {
			t.Errorf("%v: exit code %d, want %d; stderr %q, want %q in it", x.args, code, x.code, &errs, x.text)
		}
	}
}

// The whole program: start, serve, stop, check; and every line of its log is JSON with etcd's keys.
// TestAuthorReachesTheRows: on a port with TLS alone, and on one that plain clients share.
func TestAuthorReachesTheRows(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	certFile, keyFile := filepath.Join(dir, "server.pem"), filepath.Join(dir, "server-key.pem")
	ca.issue(2, "server", certFile, keyFile)
	client := ca.issue(3, "kube-apiserver", filepath.Join(dir, "client.pem"), filepath.Join(dir, "client-key.pem"))
	secure := credentials.NewTLS(&tls.Config{RootCAs: ca.pool(), Certificates: []tls.Certificate{client}})
	alone, shared := ports.FreeAddress(t), ports.FreeAddress(t)

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	logged := &syncBuffer{}
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, []string{"--data-dir", dir, "--listen-client-urls", "https://" + alone + ",https://" + shared + ",http://" + shared,
			"--cert-file", certFile, "--key-file", keyFile, "--trusted-ca-file", ca.file}, []string{"GOGC=100", "GOMEMLIMIT=8GiB"}, io.Discard, logged)
	}()
	logged.waitFor(t, "now serving")
	for key, c := range map[string]struct {
		addr  string
		creds credentials.TransportCredentials
	}{
		"alone": {alone, secure}, "shared": {shared, secure}, "plain": {shared, insecure.NewCredentials()},
	} {
		conn, err := grpc.NewClient(c.addr, grpc.WithTransportCredentials(c.creds))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte(key)}); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
	stop()
	if c := <-code; c != exitOK {
		t.Fatalf("exit code %d: %s", c, logged)
	}

	db, err := sql.Open("sqlite", filepath.Join(dir, "quire.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for key, want := range map[string]string{"alone": "kube-apiserver", "shared": "kube-apiserver", "plain": ""} {
		var got string
		if err := db.QueryRow("SELECT author FROM revisions WHERE key = ?", []byte(key)).Scan(&got); err != nil || got != want {
			t.Errorf("%s: author %q, %v; want %q", key, got, err, want)
		}
	}
}

func TestServeAndStop(t *testing.T) {
	addr := ports.FreeAddress(t)
	dir := filepath.Join(t.TempDir(), "data")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	logged := &syncBuffer{}
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, []string{"--data-dir", dir, "--listen-client-urls", "http://" + addr, "--log-level=debug", "--name=m"},
			[]string{"GOGC=100", "GOMEMLIMIT=8GiB"}, io.Discard, logged)
	}()
	logged.waitFor(t, "now serving")
	if err := checkHealth(t, addr, insecure.NewCredentials()); err != nil {
		t.Error(err)
	}
	if got, err := post(httpClient(t, nil, false), "http://"+addr+"/nothing", 0); err != nil || !strings.Contains(got, "404") {
		t.Errorf("unknown path: %q, %v", got, err)
	}
	var second bytes.Buffer
	if c := run(t.Context(), []string{"--data-dir", dir, "--listen-client-urls", "http://127.0.0.1:0"}, []string{"GOGC=100", "GOMEMLIMIT=8GiB"}, io.Discard, &second); c != 1 || !strings.Contains(second.String(), "in use") {
		t.Errorf("a second quire on the same data: exit code %d, %s", c, &second)
	}
	begin := time.Now()
	stop()
	select {
	case c := <-code:
		if c != 0 {
			t.Errorf("exit code %d", c)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it does not stop")
	}
	t.Logf("stopped in %v", time.Since(begin))

	for line := range strings.Lines(logged.String()) {
		var entry struct{ Level, TS, Caller, Msg string }
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("not JSON: %s", line)
		}
		if _, err := time.Parse("2006-01-02T15:04:05.999999Z0700", entry.TS); err != nil || entry.Level == "" || entry.Caller == "" || entry.Msg == "" {
			t.Errorf("not etcd's form: %s", line)
		}
		if entry.Level == "error" || entry.Level == "fatal" {
			t.Errorf("a normal start and stop logs: %s", line)
		}
	}
	for _, want := range []string{"ready to serve client requests", "serving client traffic insecurely", `"snapshot-catchup-entries":5000`, filepath.Join(dir, "quire.db")} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("the log has no %s", want)
		}
	}
	var out, errs bytes.Buffer
	if c := run(t.Context(), []string{"check", "--data-dir", dir}, nil, &out, &errs); c != 0 || !strings.Contains(out.String(), ": sound; revision 1,") {
		t.Errorf("check: exit code %d, %q, %q", c, &out, &errs)
	}
}

// A cluster of one member: what is particular to it on the way from the flags to the end.
func TestAMemberServesAndStops(t *testing.T) {
	client, peer := ports.FreeAddress(t), ports.FreeAddress(t)
	dir := filepath.Join(t.TempDir(), "data")
	args := []string{"--data-dir", dir, "--listen-client-urls", "http://" + client, "--listen-peer-urls", "http://" + peer, "--name=m"}
	initial := []string{"--initial-advertise-peer-urls", "http://" + peer, "--initial-cluster", "m=http://" + peer}
	for _, flags := range [][]string{append(args, initial...), args} {
		ctx, stop := context.WithCancel(t.Context())
		logged := &syncBuffer{}
		code := make(chan int, 1)
		go func() { code <- run(ctx, flags, []string{"GOGC=100", "GOMEMLIMIT=8GiB"}, io.Discard, logged) }()
		logged.waitFor(t, "now serving")
		if err := checkHealth(t, client, insecure.NewCredentials()); err != nil {
			t.Error(err)
		}
		if got, err := httpClient(t, nil, false).Get("http://" + peer + "/version"); err != nil || got.StatusCode != 200 {
			t.Errorf("/version on the peer port: %v, %v", got, err)
		}
		stop()
		if c := <-code; c != exitOK {
			t.Fatalf("exit code %d: %s", c, logged)
		}
		for _, want := range []string{"elected leader", "published local member to cluster through raft", "ready to serve client requests", `"storage-kind":"sqlraft"`} {
			if !strings.Contains(logged.String(), want) {
				t.Errorf("the log has no %s", want)
			}
		}
		for line := range strings.Lines(logged.String()) {
			if strings.Contains(line, `"level":"error"`) || strings.Contains(line, `"level":"fatal"`) {
				t.Errorf("a normal start and stop logs: %s", line)
			}
		}
	}
	var out, errs bytes.Buffer
	if c := run(t.Context(), []string{"check", "--data-dir", dir}, nil, &out, &errs); c != 0 || !strings.Contains(out.String(), ": sound; revision 1,") {
		t.Errorf("check: exit code %d, %q, %q", c, &out, &errs)
	}
}

func TestMistakesOfAMemberAreToldAtOnce(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "raft"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct{ args, text string }{
		{"--data-dir " + dir, "its first start did not come to an end"},
		{"--initial-cluster other=http://127.0.0.1:1", "couldn't find local name"},
		{"--initial-cluster default=http://127.0.0.1:1", "--initial-cluster has default=http://127.0.0.1:1 but missing from --initial-advertise-peer-urls"},
		{"--initial-cluster default=127.0.0.1:1", "--initial-cluster"},
		{"--initial-cluster default=https://127.0.0.1:1 --initial-advertise-peer-urls https://127.0.0.1:1 --listen-peer-urls https://127.0.0.1:0", "--peer-cert-file"},
		{"--initial-cluster default=http://127.0.0.1:1 --initial-advertise-peer-urls http://127.0.0.1:1 --peer-cert-file x", "--peer-key-file"},
		{"--discovery-srv invalid.", "--discovery-srv"},
	} {
		args := strings.Fields(x.args)
		if !strings.Contains(x.args, "--data-dir") {
			args = append(args, "--data-dir", t.TempDir())
		}
		var errs bytes.Buffer
		code := run(t.Context(), append(args, "--listen-client-urls", "http://127.0.0.1:0"), []string{"GOGC=100", "GOMEMLIMIT=8GiB"}, io.Discard, &errs)
		if code != exitFailed || !strings.Contains(errs.String(), x.text) {
			t.Errorf("%s: exit code %d, %s; want %q in it", x.args, code, &errs, x.text)
		}
	}
}

func TestDataDirOfARealEtcdIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "member"), 0o700); err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	code := run(t.Context(), []string{"--data-dir", dir}, []string{"GOGC=100", "GOMEMLIMIT=8GiB"}, io.Discard, &errs)
	if code != 1 || !strings.Contains(errs.String(), "holds the data of an etcd") {
		t.Errorf("exit code %d, %s", code, &errs)
	}
}

func TestLogOutputs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	for range 2 { // appended to
		c := &config{LogLevel: "warn", LogFormat: "console", LogOutputs: []string{"stdout", file}}
		var stdout bytes.Buffer
		lg, closeLog, err := newLogger(c, &stdout, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		lg.Info("quiet")
		lg.Warn("heard", zap.Int("n", 1))
		if err := closeLog(); err != nil {
			t.Fatal(err)
		}
		if s := stdout.String(); !strings.Contains(s, "heard") || strings.Contains(s, "quiet") || strings.HasPrefix(s, "{") {
			t.Errorf("stdout has %q", s)
		}
	}
	if data, err := os.ReadFile(file); err != nil || strings.Count(string(data), "heard") != 2 {
		t.Errorf("file has %q, %v", data, err)
	}
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	journald, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer journald.Close()
	core, err := newJournalCore(zapcore.NewJSONEncoder(encoderConfig), zap.InfoLevel, path)
	if err != nil {
		t.Fatal(err)
	}
	zap.New(core).With(zap.String("who", "me")).Warn("hello")
	buf := make([]byte, 4096)
	n, err := journald.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	got := string(buf[:n])
	if !strings.HasPrefix(got, "PRIORITY=4\nSYSLOG_IDENTIFIER=") || !strings.Contains(got, `"msg":"hello","who":"me"`) {
		t.Errorf("journald got %q", got)
	}
	if err := core.close(); err != nil {
		t.Fatal(err)
	}
	if _, err := newJournalCore(zapcore.NewJSONEncoder(encoderConfig), zap.InfoLevel, path+"none"); err == nil || !strings.Contains(err.Error(), "use --log-outputs=stderr") {
		t.Errorf("without journald: %v", err)
	}
}

func TestSystemdIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	if err := notifySystemd([]string{"NOTIFY_SOCKET=" + path}, "READY=1"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	if n, err := systemd.Read(buf); err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
	if err := notifySystemd(nil, "READY=1"); err != nil {
		t.Errorf("without systemd: %v", err)
	}
}

func TestMemoryTotalIsTheTightestLimit(t *testing.T) {
	files := map[string]string{
		"/proc/meminfo":     "MemTotal:       16384 kB\nMemFree: 1 kB\n",
		"/proc/self/cgroup": "0::/a.slice/b.scope\n",
	}
	read := func(name string) ([]byte, error) {
		if s, ok := files[name]; ok {
			return []byte(s), nil
		}
		return nil, errors.New("no such file")
	}
	for _, x := range []struct {
		file, text string
		want       int64
	}{
		{"/sys/fs/cgroup/memory.max", "max\n", 16 << 20},
		{"/sys/fs/cgroup/a.slice/b.scope/memory.max", "9000000\n", 9000000},
		{"/sys/fs/cgroup/a.slice/memory.max", "8000000\n", 8000000},
		{"/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n", 8000000},
	} {
		files[x.file] = x.text
		if got := memoryTotal(read); got != x.want {
			t.Errorf("with %s = %q: %d, want %d", x.file, x.text, got, x.want)
		}
	}
	clear(files)
	if got := memoryTotal(read); got != 0 {
		t.Errorf("nothing known: %d, want 0", got)
	}
}

func TestGarbagePilesUpInProportionToWhatIsWalked(t *testing.T) {
	for _, x := range []struct {
		live, scanned int64
		want          int
	}{
		{0, 0, gcPercent},
		{100 << 20, 100 << 20, gcPercent},
		{356 << 20, 100 << 20, 84},  // 300 MiB of garbage
		{260 << 20, 4 << 20, 24},    // never less than the headroom
		{8 << 20, 8 << 20, 800},     // which is much for a small heap
		{100 << 30, 1 << 20, 10},    // never next to nothing
		{300 << 20, 400 << 20, 300}, // the sample is of another moment
	} {
		if got := percentFor(x.live, x.scanned); got != x.want {
			t.Errorf("%d MiB live, %d MiB scanned: %d%%, want %d%%", x.live>>20, x.scanned>>20, got, x.want)
		}
	}
}

func TestGCIsPacedAfterEachCollection(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	stop := paceGC()
	defer stop()
	for n := range 3 {
		debug.SetGCPercent(50)
		runtime.GC()
		percent := 50
		for deadline := time.Now().Add(30 * time.Second); percent == 50 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			sample := []metrics.Sample{{Name: "/gc/gogc:percent"}}
			metrics.Read(sample)
			percent = int(sample[0].Value.Uint64())
		}
		if percent == 50 {
			t.Fatalf("collection %d went by unnoticed", n)
		}
	}
}
