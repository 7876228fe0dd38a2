package outages

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/postgres"
)

// Somebody's session holds a lock on the tables: writes are refused with advice, and go on when it is gone.
func TestSomebodyLocksATable(t *testing.T) {
	for _, table := range []string{"revisions", "commits"} {
		t.Run(table, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, postgres.Options{})
			quires := beginAll(t, 2, s.url())
			w := quires[1].watchAll(t, loadPrefix)
			ids := quires[0].grant(t, 20, 5, 1000)
			k := quires[0].keep(t, ids)
			l := write(t, 2, quires...)
			l.more(20)

			const held = 14 * time.Second
			var holder sync.WaitGroup
			defer holder.Wait()
			holder.Go(func() {
				err := s.Exec(context.Background(), s.database, fmt.Sprintf("BEGIN; LOCK TABLE quire.%s; SELECT pg_sleep(%f); COMMIT", table, held.Seconds()))
				if err != nil {
					t.Errorf("hold the lock: %v", err)
				}
			})
			ctx := within(t, patience)
			if err := s.WaitFor(ctx, s.database, "SELECT count(*) > 0 FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted AND relation = 'quire."+table+"'::regclass"); err != nil {
				t.Fatal(err)
			}
			locked := time.Now()
			refusals := 0
			for i := 0; time.Since(locked) < held; i++ {
				began := time.Now()
				err := quires[i%2].tryPut(within(t, patience))
				// It may have come while another one was waiting.
				if took := time.Since(began); took > 11*time.Second {
					t.Errorf("a write was refused only after %v", took.Round(time.Millisecond))
				}
				if time.Since(locked) > held-time.Second && err == nil {
					break // it was there in time
				}
				refusals++
				if !isUnavailable(err) || !strings.Contains(errorText(err), "pg_locks") {
					t.Errorf("a write to a locked table: %v, want Unavailable with the advice to look into pg_locks", err)
				}
				if err := quires[i%2].trySerializableGet(within(t, time.Second)); err != nil {
					t.Errorf("a serializable read: %v", err)
				}
				time.Sleep(50 * time.Millisecond)
			}
			if refusals == 0 {
				t.Error("no write was refused")
			}
			holder.Wait()
			for i, q := range quires {
				if took := eventually(t, "a write", patience, q.tryPut); took > 3*time.Second {
					t.Errorf("quire %d writes only %v after the lock is gone", i, took.Round(time.Millisecond))
				}
			}
			l.more(20)
			time.Sleep(6 * time.Second)
			if n := k.gone(); n > 0 {
				t.Errorf("%d renewals found no lease", n)
			}
			if n := quires[1].leased(t); n != int64(len(ids)) {
				t.Errorf("%d leases are left, want %d", n, len(ids))
			}
			l.stop()
			l.onlyUnavailable()
			l.account(s)
			agree(t, quires...)
			w.complete(s.rows(t, loadPrefix))
		})
	}
}

// All connections of the server are taken: quires keep those that they have; who has none is told why.
func TestMaxConnectionsIsReached(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{Settings: map[string]string{"max_connections": "30"}})
	// Not the superuser, for whom some are kept free.
	if err := s.CreateRole(t.Context(), postgres.Role{Name: "quire", Database: s.database, Schema: "quire"}); err != nil {
		t.Fatal(err)
	}
	url := s.DSN(s.database, "quire")
	quires := beginAll(t, 2, url)
	for _, q := range quires {
		q.put(t, "tried", "x")
		q.get(t, "tried")
	}
	others := &crowd{store: s, url: url}
	t.Cleanup(func() { others.leave(t) })
	others.fill(t)
	l := write(t, 2, quires...)
	l.more(50)
	for _, q := range quires {
		if err := q.tryGet(within(t, time.Second)); err != nil {
			t.Errorf("a read through a quire that has its connections: %v", err)
		}
	}
	l.stop()
	l.noError()

	late := run(t, url)
	code, err := late.Wait(patience)
	if err != nil || code == 0 {
		t.Errorf("a quire that finds no connection: status %d (%v), want it to end with another than 0", code, err)
	}
	if !strings.Contains(late.Output(), "max_connections") {
		t.Errorf("it does not name max_connections:\n%s", late.Output())
	}

	// Quires whose connections end find none any more: they are stopped until others have taken them.
	for _, q := range quires {
		if err := q.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.TerminateBackends(t.Context(), "application_name = 'quire'"); err != nil {
		t.Fatal(err)
	}
	others.fill(t)
	for _, q := range quires {
		if err := q.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	for _, q := range quires {
		// First it knows only that its connections ended.
		for began := time.Now(); time.Since(began) < lastWord && !strings.Contains(errorText(q.tryPut(within(t, patience))), "max_connections"); {
			time.Sleep(20 * time.Millisecond)
		}
		refused(t, "a write without a connection", time.Second, "max_connections", q.tryPut)
		refused(t, "a linearizable read without a connection", time.Second, "max_connections", q.tryGet)
		if err := q.trySerializableGet(within(t, time.Second)); err != nil {
			t.Errorf("a serializable read: %v", err)
		}
		if code, body := q.ready(t); code != 503 || !strings.Contains(body, "max_connections") {
			t.Errorf("/readyz without a connection: %d %q, want 503 with the reason", code, body)
		}
	}
	others.leave(t)
	for _, q := range quires {
		eventually(t, "a write when there is room again", patience, q.tryPut)
		eventually(t, "a read when there is room again", patience, q.tryGet)
	}
	l.account(s)
}

// crowd is other people's sessions.
type crowd struct {
	*store
	url      string
	sessions sync.WaitGroup
}

// fill opens sessions until the server takes no more.
func (c *crowd) fill(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; {
		for range 8 {
			c.sessions.Go(func() {
				// It fails for who comes too late, and when the crowd leaves.
				_, _ = c.QueryAt(context.Background(), c.url, "SELECT pg_sleep(60)")
			})
		}
		time.Sleep(300 * time.Millisecond)
		_, err := c.QueryAt(t.Context(), c.url, "SELECT 1")
		if text := errorText(err); strings.Contains(text, "remaining connection slots are reserved") || strings.Contains(text, "too many clients") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the server does not get full: %v", err)
		}
	}
}

// leave ends the sessions.
func (c *crowd) leave(t *testing.T) {
	t.Helper()
	if _, err := c.TerminateBackends(context.Background(), "query LIKE '%pg_sleep%'"); err != nil {
		t.Errorf("end the other sessions: %v", err)
	}
	c.sessions.Wait()
}

// The disk of the database fills up: writes are refused as by an etcd that has no space, everything else goes on.
func TestTheDiskIsFull(t *testing.T) {
	t.Parallel()
	s := newStore(t, postgres.Options{DiskBytes: 192 << 20})
	quires := beginAll(t, 2, s.url())
	w := quires[1].watchAll(t, "disk/")
	quires[0].put(t, "disk/0", "before")
	if err := s.FillDisk(); err != nil {
		t.Fatal(err)
	}
	// What is random cannot be compressed: the table has to grow.
	value := randomBytes(random(t), 256<<10)
	full := func() error {
		_, err := quires[0].kv.Put(within(t, patience), &pb.PutRequest{Key: []byte("disk/large"), Value: value})
		return err
	}
	for range 3 {
		if err := full(); !errors.Is(rpctypes.Error(err), rpctypes.ErrNoSpace) {
			t.Errorf("256 KiB into a full disk: %v, want %q", err, status.Convert(rpctypes.ErrGRPCNoSpace).Message())
		}
	}
	if !s.Running() {
		t.Fatalf("the server has stopped:\n%s", s.LogTail(2000))
	}
	for _, q := range quires {
		if got := q.get(t, "disk/0"); got != "before" {
			t.Errorf("a read on a full disk: %q", got)
		}
	}
	if code, body := quires[0].ready(t); code != 503 || !strings.Contains(body, "disk is full") {
		t.Errorf("/readyz on a full disk: %d %q, want 503 with the reason", code, body)
	}
	if err := s.FreeDisk(); err != nil {
		t.Fatal(err)
	}
	if err := full(); err != nil {
		t.Errorf("there is room again: %v", err)
	}
	quires[1].put(t, "disk/1", "after")
	for _, q := range quires {
		if code, body := q.ready(t); code != 200 {
			t.Errorf("/readyz when there is room again: %d %q", code, body)
		}
	}
	w.complete([]stored{
		{revision: 2, version: 1, key: "disk/0", value: "before"},
		{revision: 3, version: 1, key: "disk/large", value: string(value)},
		{revision: 4, version: 1, key: "disk/1", value: "after"},
	})
}
