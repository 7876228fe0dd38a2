package start

import (
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/quire-db/quire/test/ports"
)

// Etcd starts a real etcd in this process, on loopback, with its data in memory-backed storage where
// there is any and without fsync: the tests ask what it answers, not what it survives.
func Etcd(t testing.TB, o Options) *Server {
	t.Helper()
	return EtcdIn(t, filepath.Join(tempDir(t), "data"), o)
}

// EtcdIn is Etcd with a data directory of the caller, which may be that of an etcd that was stopped.
func EtcdIn(t testing.TB, dataDir string, o Options) *Server {
	t.Helper()
	log := filepath.Join(tempDir(t), "etcd.log")
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		out.Close()
		showLog(t, "etcd", log)
	})

	const attempts = 5
	for attempt := 1; ; attempt++ {
		address := ports.FreeAddress(t)
		e, err := embed.StartEtcd(etcdConfig(o, dataDir, address, out))
		if err != nil {
			// Only the port may be the reason to try again: it was free a moment ago.
			if attempt < attempts && strings.Contains(err.Error(), "address already in use") {
				continue
			}
			t.Fatalf("start etcd: %v", err)
		}
		stop := sync.OnceFunc(e.Close)
		t.Cleanup(stop)
		select {
		case <-e.Server.ReadyNotify():
		case err := <-e.Err():
			t.Fatalf("etcd stopped while starting: %v", err)
		case <-time.After(60 * time.Second):
			t.Fatal("etcd was not ready after 60s")
		}
		s := &Server{Name: "etcd", Address: address, stop: stop}
		s.dial(t, nil)
		return s
	}
}

func etcdConfig(o Options, dataDir, address string, log zapcore.WriteSyncer) *embed.Config {
	client := url.URL{Scheme: "http", Host: address}
	// The peer listener must exist but nobody calls it: any port.
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:0"}

	c := embed.NewConfig()
	c.Dir = dataDir
	c.ListenClientUrls = []url.URL{client}
	c.AdvertiseClientUrls = []url.URL{client}
	c.ListenPeerUrls = []url.URL{peer}
	c.AdvertisePeerUrls = []url.URL{peer}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.UnsafeNoFsync = true

	core := zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.Lock(log), zap.ErrorLevel)
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(core))

	if o.MaxTxnOps != 0 {
		c.MaxTxnOps = o.MaxTxnOps
	}
	if o.MaxRequestBytes != 0 {
		c.MaxRequestBytes = o.MaxRequestBytes
	}
	if o.QuotaBytes != 0 {
		c.QuotaBackendBytes = o.QuotaBytes
	}
	if o.WatchProgressNotify != 0 {
		c.WatchProgressNotifyInterval = o.WatchProgressNotify
	}
	if o.AutoCompactionMode != "" {
		c.AutoCompactionMode = o.AutoCompactionMode
		c.AutoCompactionRetention = o.AutoCompactionRetention
	}
	if o.AuthToken != "" {
		c.AuthToken = o.AuthToken
	}
	if o.AuthTokenTTL != 0 {
		c.AuthTokenTTL = o.AuthTokenTTL
	}
	if o.BcryptCost != 0 {
		c.BcryptCost = o.BcryptCost
	}
	return c
}

// tempDir is a directory that goes away with the test, in /dev/shm where that exists.
func tempDir(t testing.TB) string {
	t.Helper()
	base := os.Getenv("TMPDIR")
	if base == "" {
		if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
			base = "/dev/shm"
		}
	}
	dir, err := os.MkdirTemp(base, "blackbox-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the test's directory: %v", err)
		}
	})
	return dir
}

var showing sync.Mutex

// showLog prints the end of a server's log when the test has failed.
func showLog(t testing.TB, name, path string) {
	t.Helper()
	if !t.Failed() {
		return
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Logf("log of %s: %v", name, err)
		return
	}
	const tail = 8 << 10
	if len(data) > tail {
		data = data[len(data)-tail:]
	}
	showing.Lock()
	defer showing.Unlock()
	t.Logf("end of the log of %s:\n%s", name, data)
}
