package main

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/quire-db/quire/test/ports"
)

// running is one member of a cluster in this process.
type running struct {
	t      *testing.T
	name   string
	flags  []string
	client string // address
	dir    string
	logged *syncBuffer
	stop   context.CancelFunc
	code   chan int
}

// newRunning prepares members of a cluster.
func newRunning(t *testing.T, names ...string) []*running {
	var initial []string
	peers := map[string]string{}
	for _, name := range names {
		peers[name] = ports.FreeAddress(t)
		initial = append(initial, name+"=http://"+peers[name])
	}
	var all []*running
	for _, name := range names {
		m := &running{t: t, name: name, client: ports.FreeAddress(t), dir: t.TempDir()}
		m.flags = []string{
			"--name", name, "--data-dir", m.dir, "--listen-client-urls", "http://" + m.client, "--listen-peer-urls", "http://" + peers[name],
			"--initial-advertise-peer-urls", "http://" + peers[name], "--initial-cluster", strings.Join(initial, ","),
		}
		all = append(all, m)
	}
	return all
}

func (m *running) start(flags ...string) {
	ctx, stop := context.WithCancel(m.t.Context())
	m.logged, m.stop, m.code = &syncBuffer{}, stop, make(chan int, 1)
	logged, code := m.logged, m.code
	go func() {
		code <- run(ctx, slices.Concat(m.flags, flags), []string{"GOGC=100", "GOMEMLIMIT=8GiB"}, io.Discard, logged)
	}()
}

// end waits for the exit code.
func (m *running) end() int {
	m.t.Helper()
	select {
	case code := <-m.code:
		m.code <- code
		return code
	case <-time.After(20 * time.Second):
		m.t.Fatalf("%s does not end:\n%s", m.name, m.logged)
		return 0
	}
}

// call calls f with a connection.
func (m *running) call(f func(ctx context.Context, c *grpc.ClientConn) error) error {
	m.t.Helper()
	conn, err := grpc.NewClient(m.client, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		m.t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(m.t.Context(), 10*time.Second)
	defer cancel()
	return f(ctx, conn)
}

func (m *running) put(key, value string) {
	m.t.Helper()
	err := m.call(func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := pb.NewKVClient(c).Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// TestAMemberWithOtherDataIsFound, as etcd's tests of corruption go: a member is stopped, a value in its file is changed, and
// it is started again. With the feature gate it finds out by itself and ends, without it the leader raises the alarm.
func TestAMemberWithOtherDataIsFound(t *testing.T) {
	all := newRunning(t, "n1", "n2", "n3")
	flags := []string{"--corrupt-check-time=100ms", "--compact-hash-check-time=100ms", "--feature-gates=CompactHashCheck=true"}
	for _, m := range all {
		m.start(flags...)
		defer func() { m.stop(); m.end() }()
	}
	for _, m := range all {
		m.logged.waitFor(t, "now serving")
	}
	for i := range 10 {
		all[0].put(fmt.Sprint("k", i), fmt.Sprint(i))
	}
	culprit := all[2]
	culprit.stop()
	if code := culprit.end(); code != exitOK {
		t.Fatalf("exit code %d: %s", code, culprit.logged)
	}
	db, err := sql.Open("sqlite", "file:"+filepath.Join(culprit.dir, "quire.db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), "UPDATE revisions SET value = x'00' WHERE rev = 5"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}

	culprit.start("--corrupt-check-time=0", "--feature-gates=InitialCorruptCheck=true")
	if code := culprit.end(); code != exitFailed || !strings.Contains(culprit.logged.String(), "found data inconsistency with peers") {
		t.Errorf("exit code %d: %s", code, culprit.logged)
	}

	// The leader asks whoever was started again for the whole history, also if it is there for a moment only.
	culprit.start("--corrupt-check-time=100ms")
	var alarms []*pb.AlarmMember
	for deadline := time.Now().Add(20 * time.Second); len(alarms) == 0 && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) { // nothing tells of this
		err := all[0].call(func(ctx context.Context, c *grpc.ClientConn) error {
			answer, err := pb.NewMaintenanceClient(c).Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_GET})
			alarms = answer.GetAlarms()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(alarms) != 1 || alarms[0].Alarm != pb.AlarmType_CORRUPT {
		t.Fatalf("alarms: %v", alarms)
	}
	culprit.logged.waitFor(t, fmt.Sprintf(`"local-member-id":"%x"`, alarms[0].MemberID))
	err = all[0].call(func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := pb.NewKVClient(c).Put(ctx, &pb.PutRequest{Key: []byte("k")})
		return err
	})
	if rpctypes.Error(err) != rpctypes.ErrCorrupt {
		t.Errorf("a put with the alarm says %v", err)
	}
	leader := all[0].logged.String() + all[1].logged.String()
	for _, text := range []string{`"found hash mismatch"`, `"corrupt-members":["`, `"finished compaction hash check"`, `"finished peer corruption check"`} {
		if !strings.Contains(leader, text) {
			t.Errorf("the log has no %s", text)
		}
	}
}

// TestAMemberWithADamagedFileEnds as soon as somebody asks for what cannot be read.
func TestAMemberWithADamagedFileEnds(t *testing.T) {
	m := newRunning(t, "n1")[0]
	m.start()
	m.logged.waitFor(t, "now serving")
	value := bytes.Repeat([]byte("0123456789"), 5000)
	m.put("k", string(value))
	m.stop()
	m.end()
	path := filepath.Join(m.dir, "quire.db")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	size := int(binary.BigEndian.Uint16(data[16:]))
	for page := 0; page+size <= len(data); page += size {
		if bytes.Contains(value, data[page+4:page+size]) { // it holds a piece of the value, and the number of the page with the next one
			binary.BigEndian.PutUint32(data[page:], 1<<30)
		}
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}

	m.start()
	m.logged.waitFor(t, "now serving")
	err = m.call(func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := pb.NewKVClient(c).Range(ctx, &pb.RangeRequest{Key: []byte("k"), Serializable: true})
		return err
	})
	if err == nil {
		t.Error("the damaged value was read")
	}
	if code := m.end(); code != exitFailed || !strings.Contains(m.logged.String(), "database file is damaged: "+path) {
		t.Errorf("exit code %d: %s", code, m.logged)
	}
}
