package backend

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"
)

// randomAuth draws a change of users and roles, of which there are few. Auth is seldom on for long.
func randomAuth(rnd *rand.Rand) proto.Message {
	of := func(names ...string) string { return names[rnd.IntN(len(names))] }
	user := func() string { return of(rootUser, "ann", "b\x00b", "") }
	role := func() string { return of(RootRole, "r", "s", "ä\x00", "") }
	hash := func() string { return base64.StdEncoding.EncodeToString(fmt.Append(nil, rnd.IntN(1000))) }
	perm := func() (key, end []byte) {
		return fmt.Appendf(nil, "k%02d", rnd.IntN(20)), []byte(of("", "", "\x00", "k10", "k30"))
	}
	switch rnd.IntN(16) {
	case 0:
		return &pb.AuthEnableRequest{}
	case 1, 2:
		return &pb.AuthDisableRequest{}
	case 3, 4, 5:
		return &pb.AuthUserAddRequest{Name: user(), HashedPassword: hash(), Options: &authpb.UserAddOptions{NoPassword: rnd.IntN(4) == 0}}
	case 6:
		return &pb.AuthUserDeleteRequest{Name: user()}
	case 7:
		return &pb.AuthUserChangePasswordRequest{Name: user(), HashedPassword: hash()}
	case 8, 9:
		return &pb.AuthUserGrantRoleRequest{User: user(), Role: role()}
	case 10:
		return &pb.AuthUserRevokeRoleRequest{Name: user(), Role: role()}
	case 11:
		return &pb.AuthRoleAddRequest{Name: role()}
	case 12:
		return &pb.AuthRoleDeleteRequest{Role: role()}
	case 13:
		key, end := perm()
		return &pb.AuthRoleRevokePermissionRequest{Role: role(), Key: key, RangeEnd: end}
	case 14:
		return &pb.InternalAuthenticateRequest{Name: user(), SimpleToken: fmt.Sprint("hash", rnd.IntN(100))}
	default:
		key, end := perm()
		p := &authpb.Permission{PermType: authpb.Permission_Type(rnd.IntN(3)), Key: key, RangeEnd: end}
		return &pb.AuthRoleGrantPermissionRequest{Name: role(), Perm: p}
	}
}

// authText is all there is of users and roles.
func authText(t *testing.T, db *DB) string {
	t.Helper()
	text, err := json.Marshal(db.Auth().since(newAuth()))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// asRoot may do everything, whatever has changed since.
func asRoot(req proto.Message) Command {
	return Command{Request: req, Author: rootUser, AuthRevision: 1 << 40}
}

func mustAuth(t *testing.T, db *DB, reqs ...proto.Message) {
	t.Helper()
	for _, r := range reqs {
		if _, err := db.Write(t.Context(), asRoot(r)); err != nil {
			t.Fatalf("%T: %v", r, err)
		}
	}
}

// makeAuth makes root, and a user who may write "k" and read what begins with "k".
func makeAuth(t *testing.T, db *DB) {
	t.Helper()
	mustAuth(t, db,
		&pb.AuthUserAddRequest{Name: rootUser, HashedPassword: "cm9vdA=="},
		&pb.AuthUserGrantRoleRequest{User: rootUser, Role: RootRole},
		&pb.AuthUserAddRequest{Name: "ann", HashedPassword: "YW5u"},
		&pb.AuthRoleAddRequest{Name: "r"},
		&pb.AuthRoleGrantPermissionRequest{Name: "r", Perm: &authpb.Permission{PermType: authpb.Permission_WRITE, Key: []byte("k")}},
		&pb.AuthRoleGrantPermissionRequest{Name: "r", Perm: &authpb.Permission{Key: []byte("k"), RangeEnd: []byte("l")}},
		&pb.AuthUserGrantRoleRequest{User: "ann", Role: "r"},
	)
}

func TestUsersAndRolesAreWhatWasWritten(t *testing.T) {
	rnd := seed(t)
	path := testPath(t)
	db, err := OpenSQLite(t.Context(), path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range 6 {
		done := 0
		for range 300 {
			if _, err := db.Write(t.Context(), asRoot(randomAuth(rnd))); err == nil {
				done++
			}
		}
		if done < 30 {
			t.Errorf("only %d of 300 requests have changed something", done)
		}
		want, enabled := authText(t, db), db.Auth().Enabled()
		mustDo(t, db.Close())
		if db, err = OpenSQLite(t.Context(), path, Options{}); err != nil {
			t.Fatal(err)
		}
		if got := authText(t, db); got != want || db.Auth().Enabled() != enabled {
			t.Fatalf("after a restart users and roles are\n%s, want\n%s", got, want)
		}
	}
	// Random changes can leave auth on, and root without their role: then the check has something to say.
	report, err := func() (CheckReport, error) { mustDo(t, db.Close()); return CheckSQLite(t.Context(), path, nil) }()
	sound(t, report, err)
}

func TestProcessesOnOneDatabaseShareUsersAndTokens(t *testing.T) {
	rnd := seed(t)
	o := pgTestOptions(t)
	a, b := openPostgresTest(t, o, Options{}), openPostgresTest(t, o, Options{})
	for i := range 300 {
		db, other := a, b
		if rnd.IntN(2) == 0 {
			db, other = b, a
		}
		if _, err := db.Write(t.Context(), asRoot(randomAuth(rnd))); err != nil {
			continue
		}
		if err := other.Linearizable(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got, want := authText(t, other), authText(t, db); got != want {
			t.Fatalf("request %d: the other process has\n%s, want\n%s", i, got, want)
		}
		for n := range 100 {
			hash := fmt.Sprint("hash", n)
			user, ok := db.TokenUser(hash, db.Auth())
			if u, k := other.TokenUser(hash, other.Auth()); u != user || k != ok {
				t.Fatalf("request %d: %s is that of %q, %v, with the other process of %q, %v", i, hash, user, ok, u, k)
			}
		}
	}
	c := openPostgresTest(t, o, Options{})
	if got, want := authText(t, c), authText(t, a); got != want {
		t.Errorf("a new process has\n%s, want\n%s", got, want)
	}
}

// Who is checked is who asks, against what the Commands before have left.
func TestPermissionIsCheckedInTheCommit(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	makeAuth(t, db)
	mustAuth(t, db, &pb.AuthEnableRequest{})
	rev := db.Auth().Revision()
	ann := func(req proto.Message) error {
		_, err := db.Write(t.Context(), Command{Request: req, Author: "ann", AuthRevision: rev})
		return err
	}
	mustDo(t, ann(putReq("k", "v")))
	if err := ann(putReq("k2", "v")); !errors.Is(err, ErrPermissionDenied) {
		t.Errorf("another key: %v", err)
	}
	if _, err := db.Write(t.Context(), Command{Request: putReq("k", "v"), Author: "ann"}); !errors.Is(err, ErrUserEmpty) {
		t.Errorf("a name that nobody has checked: %v", err)
	}
	mustAuth(t, db, &pb.AuthRoleAddRequest{Name: "other"})
	if err := ann(putReq("k", "v")); !errors.Is(err, ErrAuthOldRevision) {
		t.Errorf("a caller of before: %v", err)
	}
	if err := ann(&pb.AuthDisableRequest{}); !errors.Is(err, ErrAuthOldRevision) {
		t.Errorf("a caller of before, for what needs root: %v", err)
	}
	// In one batch, without any answer in between.
	rev = db.Auth().Revision()
	alone(t, db, func() error {
		b := db.newBatch(db.now(), 1)
		defer b.rollback()
		if _, err := b.apply(asRoot(&pb.AuthUserRevokeRoleRequest{Name: "ann", Role: "r"})); err != nil {
			t.Error(err)
		}
		if _, err := b.apply(Command{Request: putReq("k", "v"), Author: "ann", AuthRevision: rev + 1}); !errors.Is(err, ErrPermissionDenied) {
			t.Errorf("after the role was taken away in the same batch: %v", err)
		}
		return nil
	})
	mustDo(t, ann(putReq("k", "v"))) // it was rolled back
	// What quire does by itself asks nobody. A client whom a process let through that has not heard that auth is on is not quire.
	for _, req := range []proto.Message{
		&pb.CompactionRequest{Revision: 2}, &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_CORRUPT},
	} {
		if _, err := db.Write(t.Context(), Command{Request: req}); !errors.Is(err, ErrUserEmpty) {
			t.Errorf("%T by nobody: %v", req, err)
		}
		if _, err := db.Write(t.Context(), Command{Request: req, AuthRevision: ByItself}); err != nil {
			t.Errorf("%T by quire: %v", req, err)
		}
	}
}

func TestTokensEnd(t *testing.T) {
	db := openTest(t, testPath(t), Options{TokenTTL: 200 * time.Millisecond})
	makeAuth(t, db)
	give := func(hash string) error {
		_, err := db.Write(t.Context(), Command{Request: &pb.InternalAuthenticateRequest{Name: "ann", SimpleToken: hash}})
		return err
	}
	if err := give("1"); !errors.Is(err, ErrAuthNotEnabled) {
		t.Errorf("while auth is off: %v", err)
	}
	mustAuth(t, db, &pb.AuthEnableRequest{})
	good := func(hash string) bool { user, ok := db.TokenUser(hash, db.Auth()); return ok && user == "ann" }
	mustDo(t, give("1"))
	for range 8 {
		if !good("1") {
			t.Fatal("a token that is used has ended")
		}
		time.Sleep(50 * time.Millisecond)
	}
	time.Sleep(300 * time.Millisecond)
	if good("1") {
		t.Error("a token that was not used is good")
	}
	for hash, end := range map[string][]proto.Message{
		"password": {&pb.AuthUserChangePasswordRequest{Name: "ann", HashedPassword: "MTI="}},
		"deleted":  {&pb.AuthUserDeleteRequest{Name: "ann"}, &pb.AuthUserAddRequest{Name: "ann", HashedPassword: "MTM="}},
		"off":      {&pb.AuthDisableRequest{}, &pb.AuthEnableRequest{}},
	} {
		mustDo(t, give(hash))
		if !good(hash) {
			t.Errorf("%s: it is not good at first", hash)
		}
		mustAuth(t, db, end...)
		if good(hash) {
			t.Errorf("%s: it is good", hash)
		}
	}
	db.tokens.swept = time.Time{}
	mustDo(t, give("last"))
	db.tokens.swept = time.Time{}
	time.Sleep(300 * time.Millisecond)
	mustDo(t, give("sweep"))
	if n := len(db.tokens.byHash); n != 1 {
		t.Errorf("%d tokens are kept, want 1", n)
	}
}

// A database in which somebody has rights without being there is not opened: who may do what must not be guessed.
func TestDamagedUsersAreNotGuessed(t *testing.T) {
	for what, sql := range map[string]string{
		"a role of nobody":       "DELETE FROM auth_user WHERE name = 'ann'",
		"permissions of no role": "DELETE FROM auth_role WHERE name = 'r'",
	} {
		path := testPath(t)
		db, err := OpenSQLite(t.Context(), path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		makeAuth(t, db)
		alone(t, db, func() error { return sqliteOf(db).w.exec(sql) })
		mustDo(t, db.Close())
		if _, err := OpenSQLite(t.Context(), path, Options{}); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "restore a backup") {
			t.Errorf("%s: %v", what, err)
		}
		report, err := CheckSQLite(t.Context(), path, nil)
		if err != nil || len(report.Problems) == 0 {
			t.Errorf("%s: the check finds %q, %v", what, report.Problems, err)
		}
	}
}

func TestSpans(t *testing.T) {
	merged := func(perms ...string) spans {
		var s spans
		for _, p := range perms {
			key, end, _ := strings.Cut(p, "-")
			s = append(s, spanOf([]byte(key), []byte(end)))
		}
		return s.merged()
	}
	for _, c := range []struct {
		perms     []string
		key, end  string
		want      bool
		intervals int
	}{
		{nil, "a", "", false, 0},
		{[]string{"a"}, "a", "", true, 1},
		{[]string{"a"}, "a", "a\x00", true, 1},
		{[]string{"a"}, "a\x00", "", false, 1},
		{[]string{"a-c", "c-e"}, "b", "d", true, 1},
		{[]string{"c-e", "a-c", "b-d", "a-b"}, "a", "e", true, 1},
		{[]string{"a-c", "d-e"}, "b", "e", false, 2},
		{[]string{"a-\x00", "b-c"}, "b", "\x00", true, 1},
		{[]string{"b-\x00"}, "a", "\x00", false, 1},
		{[]string{"a-z"}, "b", "\x00", false, 1},
		{[]string{"a-z"}, "b", "a", false, 1},
		{[]string{"\x00-\x00"}, "\x00", "\x00", true, 1},
	} {
		s := merged(c.perms...)
		if got := s.cover(spanOf([]byte(c.key), []byte(c.end))); got != c.want || len(s) != c.intervals {
			t.Errorf("%q cover [%q,%q): %v in %d, want %v in %d", c.perms, c.key, c.end, got, len(s), c.want, c.intervals)
		}
	}
}
