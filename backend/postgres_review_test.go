package backend

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/postgres"
)

// pgTest is a database of its own, asked past all that may be in between.
type pgTest struct {
	t        *testing.T
	server   *postgres.Server
	database string
	options  PostgresOptions
}

func newPgTest(t *testing.T, s *postgres.Server) *pgTest {
	t.Helper()
	database := postgres.Database(t, s)
	return &pgTest{t: t, server: s, database: database, options: PostgresOptions{URL: s.DSN(database, "postgres"), Name: t.Name()}}
}

func (p *pgTest) exec(statements ...string) {
	p.t.Helper()
	if err := p.server.Exec(p.t.Context(), p.database, statements...); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pgTest) query(sql string) string {
	p.t.Helper()
	rows, err := p.server.Query(p.t.Context(), p.database, sql)
	if err != nil {
		p.t.Fatal(err)
	}
	return rows[0][0]
}

// proxied puts a proxy in front of the server.
func (p *pgTest) proxied() *postgres.Proxy {
	p.t.Helper()
	proxy, err := postgres.StartProxy(p.server.Address)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if err := proxy.Close(); err != nil {
			p.t.Error(err)
		}
	})
	return proxy
}

// holding runs f under the commit token.
func holding(t *testing.T, db *DB, f func() error) {
	t.Helper()
	if _, err := db.step(f); err != nil {
		t.Fatal(err)
	}
}

func TestPostgresLinearizableWaitsUntilABatchIsVisible(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	db := openPostgresTest(t, p.options, Options{})
	mustPut(t, db, "k", "old")
	// The batch is committed, but on its way to the View it is stopped.
	db.ring.mu.RLock()
	written := make(chan error, 1)
	go func() {
		_, err := db.Write(context.Background(), Command{Request: &pb.PutRequest{Key: []byte("k"), Value: []byte("new")}})
		written <- err
	}()
	for p.query(`SELECT max(seq) FROM quire.commits`) != "3" {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(50 * time.Millisecond)
	read := make(chan error, 1)
	go func() { read <- db.Linearizable(context.Background()) }()
	select {
	case err := <-read:
		v := db.View()
		defer v.Release()
		t.Errorf("Linearizable returned (%v) before the batch was visible: the View is at revision %d", err, v.Revision())
		db.ring.mu.RUnlock()
	case <-time.After(300 * time.Millisecond):
		db.ring.mu.RUnlock()
		if err := <-read; err != nil {
			t.Error(err)
		}
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}

// A batch that was not even sent must not leave the transaction open that it was to end: what is written next would never
// be committed, and nobody else could write.
func TestPostgresABatchThatWasNotSentEndsItsTransaction(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	db := openPostgresTest(t, p.options, Options{})
	mustPut(t, db, "k", "1")
	log := db.shared
	holding(t, db, func() error {
		if err := log.catchUp(db.replay); err != nil {
			return err
		}
		b := db.newBatch(db.now(), db.now())
		b.next("")
		b.put([]byte("k"), []byte("2"), 0)
		late, cancel := context.WithDeadline(context.Background(), time.Now().Add(-time.Second))
		defer cancel()
		if err := log.append(late, b); !errors.Is(err, errBehind) {
			t.Errorf("a batch that came too late to be sent: %v", err)
		}
		b.rollback()
		db.publish()
		if status := log.writer.c.TxStatus(); status != 'I' {
			t.Errorf("the writer's connection is left in state %c", status)
		}
		return nil
	})
	for log.usable() != nil {
		time.Sleep(time.Millisecond)
	}
	mustPut(t, db, "k", "3")
	if got := p.query(`SELECT count(*) FROM quire.revisions`); got != "2" {
		t.Errorf("%s rows are committed, want 2", got)
	}
}

// A process that stops while it holds the writers' lock, or whose network does, must not stop all others.
func TestPostgresALockHolderThatStopsIsNotWaitedForLong(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	a, b := openPostgresTest(t, p.options, Options{}), openPostgresTest(t, p.options, Options{})
	mustPut(t, a, "k", "1")
	if err := b.Linearizable(t.Context()); err != nil {
		t.Fatal(err)
	}
	holding(t, a, func() error {
		if err := a.shared.catchUp(a.replay); err != nil {
			return err
		}
		start := time.Now()
		if _, err := b.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("k"), Value: []byte("2")}}); err != nil {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
		_ = a.shared.release() // the server has ended the connection
		return nil
	})
	for a.shared.usable() != nil {
		time.Sleep(time.Millisecond)
	}
	mustPut(t, a, "k", "3")
	if got := mustGet(t, b, "k").Kvs[0]; string(got.Value) != "3" {
		t.Errorf("k is %v", got)
	}
}

// While a synchronous standby is away nobody may see what it does not have: it may be the primary next. A writer that
// gives up waiting must not make the server give up too.
func TestPostgresAWriterThatGivesUpShowsNobodyWhatTheStandbyLacks(t *testing.T) {
	s := postgres.New(t, postgres.Options{})
	standby, err := s.Standby(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := standby.Stop(); err != nil {
			t.Error(err)
		}
	})
	p := newPgTest(t, s)
	db, err := OpenPostgres(t.Context(), p.options, Options{})
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, db, "k", "1")
	if err := standby.Pause(); err != nil {
		t.Fatal(err)
	}
	_, err = db.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte("k"), Value: []byte("2")}})
	if !errors.Is(err, ErrStorage) {
		t.Errorf("a write that the standby did not confirm: %v", err)
	}
	if got := p.query(`SELECT count(*) FROM quire.revisions`); got != "1" {
		t.Errorf("%s rows are visible, want 1", got)
	}
	if err := standby.Resume(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		if err = db.Linearizable(t.Context()); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	mustPut(t, db, "k", "3")
	if err := db.Close(); err != nil {
		t.Error(err)
	}
}

func TestPostgresAHostThatDoesNotAnswerLeavesTimeForTheNext(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	silent := p.proxied()
	silent.Hang()
	o := p.options
	// sslmode=prefer, the default, asks each host twice.
	o.URL = strings.Replace(o.URL, p.server.Address, silent.Address+","+p.server.Address, 1)
	o.URL = strings.Replace(o.URL, "sslmode=disable", "sslmode=prefer", 1)
	start := time.Now()
	db := openPostgresTest(t, o, Options{})
	mustPut(t, db, "k", "1")
	t.Logf("open and write: %v", time.Since(start))
}

func TestPostgresCloseWhileReadersAsk(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	proxy := p.proxied()
	o := p.options
	o.URL = p.server.DSNAt(proxy.Address, p.database, "postgres")
	db, err := OpenPostgres(t.Context(), o, Options{})
	if err != nil {
		t.Fatal(err)
	}
	proxy.Delay(30 * time.Millisecond)
	ctx, cancel := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	for range 8 {
		readers.Go(func() {
			for ctx.Err() == nil && db.Linearizable(ctx) == nil {
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	cancel() // the readers are gone; what they asked is under way
	readers.Wait()
	if err := db.Close(); err != nil {
		t.Error(err)
	}
	if err := db.Linearizable(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// A batch whose answer was lost is looked up: it is there once, and its writer hears that it is.
func TestPostgresALostAnswerIsLookedUp(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	proxy := p.proxied()
	o := p.options
	o.URL = p.server.DSNAt(proxy.Address, p.database, "postgres")
	a, b := openPostgresTest(t, o, Options{}), openPostgresTest(t, p.options, Options{})
	for i, locked := range []bool{false, true, false, true} {
		if locked { // another process was faster, so a writes under the lock
			holding(t, a, func() error { mustPut(t, b, "other", "1"); return nil })
		}
		key := fmt.Sprintf("k%d", i)
		var cut <-chan struct{}
		if locked {
			cut = proxy.CutBeforeAnswer("COMMIT\x00")
		} else {
			cut = proxy.CutBeforeAnswer("commit_batch")
		}
		mustPut(t, a, key, "1")
		select {
		case <-cut:
		default:
			t.Fatal("no answer was lost")
		}
		for _, db := range []*DB{a, b} {
			for db.shared.usable() != nil {
				time.Sleep(time.Millisecond)
			}
			if got := mustGet(t, db, key).Kvs; len(got) != 1 || got[0].Version != 1 {
				t.Errorf("%s is %v", key, got)
			}
		}
	}
}

// What became of a batch cannot be said any more when the batches around it are deleted, or lost.
func TestPostgresResolveDoesNotGuess(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	db := openPostgresTest(t, p.options, Options{})
	for i := range 4 {
		mustPut(t, db, "k", fmt.Sprint(i))
	}
	p.exec(`DELETE FROM quire.commits WHERE seq < 5`)
	holding(t, db, func() error {
		found, err := db.shared.resolve(pgPosition{seq: 2}, newPgToken(), time.Now())
		if err == nil {
			t.Errorf("found = %v", found)
		}
		found, err = db.shared.resolve(pgPosition{seq: 4}, db.shared.position().token, time.Now())
		if err != nil || !found {
			t.Errorf("the newest batch: %v, %v", found, err)
		}
		found, err = db.shared.resolve(db.shared.position(), newPgToken(), time.Now())
		if err != nil || found {
			t.Errorf("a batch that was not written: %v, %v", found, err)
		}
		return nil
	})
	mustPut(t, db, "k", "last")
}

// A batch that ends the server's process whenever it is written fails; it is not tried for ever.
func TestPostgresABatchThatAlwaysBreaksTheConnectionFails(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	a, b := openPostgresTest(t, p.options, Options{}), openPostgresTest(t, p.options, Options{})
	p.exec(`CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN IF NEW.key = 'poison' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NEW; END $$`,
		`CREATE TRIGGER poison BEFORE INSERT ON quire.revisions FOR EACH ROW EXECUTE FUNCTION poison()`)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := a.Write(ctx, Command{Request: &pb.PutRequest{Key: []byte("poison")}})
		done <- err
	}()
	select {
	case err := <-done:
		if !errors.Is(err, ErrUnavailable) {
			t.Errorf("the write answered %v", err)
		}
	case <-ctx.Done():
		t.Error("the write is still being tried")
		p.exec(`DROP TRIGGER poison ON quire.revisions`)
		<-done
	}
	p.exec(`DROP TRIGGER IF EXISTS poison ON quire.revisions`)
	mustPut(t, b, "k", "1")
	for a.shared.usable() != nil {
		time.Sleep(time.Millisecond)
	}
	mustPut(t, a, "k", "2")
}

func TestPostgresClockFollowsAJump(t *testing.T) {
	var c pgClock
	start := time.Now()
	const hour = int64(3600e6)
	c.sample(start, start.Add(200*time.Microsecond), 1000e6)
	// Less exact, and it fits: the exact one stays.
	c.sample(start, start.Add(40*time.Millisecond), 1000e6+30e3)
	if off := c.offset - 1000e6; off > 1000 || off < -1000 {
		t.Errorf("a less exact sample moved the clock by %d µs", off)
	}
	// It cannot be the same clock any more: a machine that slept, or another server.
	c.sample(start, start.Add(40*time.Millisecond), 1000e6+hour)
	if off := c.offset - 1000e6 - hour; off > 50e3 || off < -50e3 {
		t.Errorf("after a jump of an hour the clock is wrong by %d µs", off)
	}
}

// A process that was not heard of for long reads rows that others have deleted: it must not take the rest for everything.
func TestPostgresHistoryHasNoHolesForWhoWasAway(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	a := openPostgresTest(t, p.options, Options{})
	for i := range 20 {
		mustPut(t, a, "k", fmt.Sprint(i))
	}
	away := openPostgresTest(t, p.options, Options{})
	holding(t, away, func() error { // so it takes nothing over
		p.exec(`DELETE FROM quire.process WHERE seq < 0 OR id <> (SELECT id FROM quire.process ORDER BY started_at LIMIT 1)`)
		mustWrite(t, a, &pb.CompactionRequest{Revision: 21})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := a.WaitCompacted(ctx, 21); err != nil {
			t.Error(err)
			return nil
		}
		res, err := away.History(t.Context(), HistoryRequest{From: 3, Key: []byte{0}, RangeEnd: []byte{0}})
		if !errors.Is(err, ErrCompacted) {
			t.Errorf("history from 3 has %d events (%v), want an error: rows are gone", len(res.Events), err)
		}
		return nil
	})
}

func TestPostgresOpenGoesOnWhereTheFirstWasKilled(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	// What a process leaves that was killed before the first migration was done.
	p.exec(`CREATE SCHEMA quire`, `CREATE TABLE quire.schema_version (id integer PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY,
		version_id bigint NOT NULL, is_applied boolean NOT NULL, tstamp timestamp NOT NULL DEFAULT now())`,
		`INSERT INTO quire.schema_version (version_id, is_applied) VALUES (0, true)`)
	mustPut(t, openPostgresTest(t, p.options, Options{}), "k", "1")
}

func TestPostgresSchemaNames(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	for _, name := range []string{"Upper", "with space", "a.b", "semi;colon", `quo"te`, "ümlaut", "-- +goose Down", "it's", "do$$llar", `back\slash`, "${schema}"} {
		t.Run(name, func(t *testing.T) {
			o := p.options
			o.Schema = name
			if o.Check() != nil {
				return // refused before anything is made
			}
			a, b := openPostgresTest(t, o, Options{}), openPostgresTest(t, o, Options{})
			mustPut(t, a, "k", name)
			if got := mustGet(t, b, "k").Kvs; len(got) != 1 || string(got[0].Value) != name {
				t.Errorf("k is %v", got)
			}
		})
	}
}

func TestPostgresManyStartBehindASmallPool(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	bouncer, err := postgres.StartPgBouncer(t.Context(), p.server, postgres.PgBouncerOptions{Settings: map[string]string{"default_pool_size": "3"}})
	if err != nil {
		if errors.Is(err, postgres.ErrNotInstalled) {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of PgBouncer's log:\n%s", bouncer.LogTail(4000))
		}
		if err := bouncer.Stop(); err != nil {
			t.Error(err)
		}
	})
	o := p.options
	o.URL = bouncer.DSN(p.database, "postgres")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			db, err := OpenPostgres(ctx, o, Options{})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := db.Write(ctx, Command{Request: &pb.PutRequest{Key: []byte(fmt.Sprint(i))}}); err != nil {
				t.Error(err)
			}
			if err := db.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if got := p.query(`SELECT count(*) FROM quire.revisions`); got != "8" {
		t.Errorf("%s rows, want 8", got)
	}
}

func TestPostgresRoleThatOwnsOnlyItsSchema(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	role := "owner_" + p.database
	if err := p.server.CreateRole(t.Context(), postgres.Role{Name: role, Database: p.database, Schema: "theirs"}); err != nil {
		t.Fatal(err)
	}
	o := p.options
	o.URL, o.Schema = p.server.DSN(p.database, role), "theirs"
	db := openPostgresTest(t, o, Options{})
	mustWrite(t, db, &pb.LeaseGrantRequest{ID: 1, TTL: 60})
	mustWrite(t, db, &pb.PutRequest{Key: []byte("k\x00\xff"), Value: []byte{0xff, 0}, Lease: 1})
	mustPut(t, db, "k", "1")
	rev := mustPut(t, db, "k", "2")
	mustWrite(t, db, &pb.CompactionRequest{Revision: rev})
	if err := db.WaitCompacted(t.Context(), rev); err != nil {
		t.Error(err)
	}
}

// What the role or the database have as their default must not make an acknowledged batch less safe.
func TestPostgresSynchronousCommitIsOnInABatch(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	p.exec(fmt.Sprintf(`ALTER DATABASE %q SET synchronous_commit = off`, p.database))
	db := openPostgresTest(t, p.options, Options{})
	p.exec(`CREATE TABLE seen (value text)`, `CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN INSERT INTO public.seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$`,
		`CREATE CONSTRAINT TRIGGER look AFTER INSERT ON quire.commits DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION look()`)
	mustPut(t, db, "k", "1")
	if got := p.query(`SELECT string_agg(value, ',') FROM seen`); got != "on" {
		t.Errorf("a batch was committed with synchronous_commit = %s", got)
	}
}

func TestPostgresLargeBatchesReachTheOthers(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	a, b := openPostgresTest(t, p.options, Options{}), openPostgresTest(t, p.options, Options{})
	value := strings.Repeat("0123456789abcdef", 3<<20/2/16)
	var all sync.WaitGroup
	for i := range 24 {
		db := []*DB{a, b}[i%2]
		all.Go(func() {
			if _, err := db.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte(fmt.Sprintf("k%02d", i)), Value: []byte(value)}}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for i := range 24 {
		if got := mustGet(t, []*DB{b, a}[i%2], fmt.Sprintf("k%02d", i)).Kvs; len(got) != 1 || string(got[0].Value) != value {
			t.Errorf("k%02d: %d keys", i, len(got))
		}
	}
}

// Wherever a request is cut off, a batch is there once if its writer was told so, and not if it was told that nothing was
// changed.
func TestPostgresRequestsCutOffAnywhere(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	proxy := p.proxied()
	o := p.options
	o.URL = p.server.DSNAt(proxy.Address, p.database, "postgres")
	a, b := openPostgresTest(t, o, Options{}), openPostgresTest(t, p.options, Options{})
	var acknowledged, refused, unknown int
	for i := range 60 {
		if i%2 == 1 {
			holding(t, a, func() error { mustPut(t, b, "other", "1"); return nil })
		}
		key := fmt.Sprintf("k%d", i)
		proxy.CutAfterBytes(1 + i*29)
		_, err := a.Write(t.Context(), Command{Request: &pb.PutRequest{Key: []byte(key), Value: []byte(strings.Repeat("v", 300))}})
		if err := proxy.Heal(); err != nil {
			t.Fatal(err)
		}
		got := mustGet(t, b, key).Kvs
		switch {
		case len(got) > 1 || len(got) == 1 && got[0].Version != 1:
			t.Errorf("%s is %v", key, got)
		case err == nil:
			acknowledged++
			if len(got) == 0 {
				t.Errorf("%s was acknowledged, and is not there", key)
			}
		case errors.Is(err, ErrStorage):
			unknown++
		case errors.Is(err, ErrUnavailable):
			refused++
			if len(got) != 0 {
				t.Errorf("%s is there, and its writer was told that nothing was changed: %v", key, err)
			}
		default:
			t.Errorf("%s: %v", key, err)
		}
		for a.shared.usable() != nil {
			time.Sleep(time.Millisecond)
		}
	}
	t.Logf("%d acknowledged, %d refused, %d unknown", acknowledged, refused, unknown)
	if acknowledged == 0 {
		t.Error("none was acknowledged")
	}
}

// A commit that somebody stopped waiting for the standby is not acknowledged: not it, and not the one that looks it up.
func TestPostgresACommitThatIsToldNotToWaitForTheStandby(t *testing.T) {
	s := postgres.New(t, postgres.Options{})
	standby, err := s.Standby(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := standby.Stop(); err != nil {
			t.Error(err)
		}
	})
	p := newPgTest(t, s)
	db := openPostgresTest(t, p.options, Options{})
	mustPut(t, db, "k", "1")
	if err := standby.Pause(); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		_, err := db.Write(context.Background(), Command{Request: &pb.PutRequest{Key: []byte("k"), Value: []byte("2")}})
		written <- err
	}()
	cancelled := 0
	for ; len(written) == 0; time.Sleep(20 * time.Millisecond) {
		if p.query(`SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'`) != "0" {
			cancelled++
		}
	}
	if err := <-written; !errors.Is(err, ErrStorage) || cancelled < 2 {
		t.Errorf("a write of which %d commits were told not to wait: %v", cancelled, err)
	}
	if err := standby.Resume(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); db.Linearizable(t.Context()) != nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(db.Linearizable(t.Context()))
		}
	}
	mustPut(t, db, "k", "3")
}

// A batch whose last rows are compacted already is not shown without them.
func TestPostgresABatchWithoutItsLastRowIsNotShown(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	a, err := OpenPostgres(t.Context(), p.options, Options{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := OpenPostgres(t.Context(), p.options, Options{})
	if err != nil {
		t.Fatal(err)
	}
	put := func(key string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key)}}}
	}
	p.exec(`CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$`,
		`CREATE TRIGGER lose BEFORE INSERT ON quire.revisions FOR EACH ROW WHEN (NEW.key = 'y') EXECUTE FUNCTION lose()`)
	if _, err := b.Write(t.Context(), Command{Request: &pb.TxnRequest{Success: []*pb.RequestOp{put("x"), put("y")}}}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); a.shared.lost.Load() == nil && a.Revision() == 1 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if err := a.Linearizable(t.Context()); !errors.Is(err, ErrHistoryLost) {
		t.Errorf("a read of a batch that is not all there: %v", err)
	}
	if a.Revision() != 1 {
		t.Errorf("revision %d is shown", a.Revision())
	}
	for _, db := range []*DB{a, b} {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}
}

// The clock of the database may be set back, or be that of another machine after a failover.
func TestPostgresClockThatIsSetBack(t *testing.T) {
	p := newPgTest(t, postgres.Shared(t))
	db := openPostgresTest(t, p.options, Options{})
	mustPut(t, db, "k", "1")
	p.exec(`CREATE OR REPLACE FUNCTION quire.now_us() RETURNS bigint LANGUAGE sql VOLATILE AS
		$$ SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - 7200000000 $$`)
	opened := db.now()
	for mustPut(t, db, "k", "2"); db.now() > opened; time.Sleep(10 * time.Millisecond) {
		mustPut(t, db, "k", "3")
	}
	written := make(chan error, 1)
	go func() {
		_, err := db.Write(context.Background(), Command{Request: &pb.LeaseGrantRequest{ID: 7, TTL: 1}})
		for range 3 {
			if err == nil {
				_, err = db.Write(context.Background(), Command{Request: &pb.PutRequest{Key: []byte("k"), Value: []byte("4")}})
			}
		}
		written <- err
	}()
	select {
	case err := <-written:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		panic("the committer prolongs a lease for ever")
	}
	for deadline := time.Now().Add(time.Minute); len(db.Leases()) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a lease of 1 s has not expired after a minute")
		}
	}
}
