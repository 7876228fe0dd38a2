package quireonly

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/quire-db/quire/test/etcd/start"
	"github.com/quire-db/quire/test/ports"
)

const (
	rootPassword = "the-password-of-root"
	annPassword  = "the-password-of-ann"
)

// withAuth switches auth on, with a user ann who may write all that begins with "a".
func withAuth(t *testing.T, s *start.Server) (root, ann context.Context) {
	t.Helper()
	ctx := t.Context()
	a := pb.NewAuthClient(s.Conn)
	for _, call := range []func() error{
		func() error {
			_, err := a.UserAdd(ctx, &pb.AuthUserAddRequest{Name: "root", Password: rootPassword})
			return err
		},
		func() error {
			_, err := a.UserGrantRole(ctx, &pb.AuthUserGrantRoleRequest{User: "root", Role: "root"})
			return err
		},
		func() error {
			_, err := a.UserAdd(ctx, &pb.AuthUserAddRequest{Name: "ann", Password: annPassword})
			return err
		},
		func() error { _, err := a.RoleAdd(ctx, &pb.AuthRoleAddRequest{Name: "as"}); return err },
		func() error {
			p := &authpb.Permission{PermType: authpb.Permission_READWRITE, Key: []byte("a"), RangeEnd: []byte("b")}
			_, err := a.RoleGrantPermission(ctx, &pb.AuthRoleGrantPermissionRequest{Name: "as", Perm: p})
			return err
		},
		func() error {
			_, err := a.UserGrantRole(ctx, &pb.AuthUserGrantRoleRequest{User: "ann", Role: "as"})
			return err
		},
		func() error { _, err := a.AuthEnable(ctx, &pb.AuthEnableRequest{}); return err },
	} {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}
	return login(t, s, "root", rootPassword), login(t, s, "ann", annPassword)
}

func login(t *testing.T, s *start.Server, user, password string) context.Context {
	t.Helper()
	resp, err := pb.NewAuthClient(s.Conn).Authenticate(t.Context(), &pb.AuthenticateRequest{Name: user, Password: password})
	if err != nil {
		t.Fatal(err)
	}
	return metadata.AppendToOutgoingContext(t.Context(), rpctypes.TokenFieldNameGRPC, resp.Token)
}

// Users, roles and permissions are as durable as keys.
func TestUsersSurviveEveryEnd(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "data")
			s := start.QuireIn(t, dir, start.Options{BcryptCost: 4})
			_, ann := withAuth(t, s)
			before, err := pb.NewAuthClient(s.Conn).AuthStatus(t.Context(), &pb.AuthStatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.KV.Put(ann, &pb.PutRequest{Key: []byte("a")}); err != nil {
				t.Fatal(err)
			}
			stop(t, s, sig)
			s = start.QuireIn(t, dir, start.Options{BcryptCost: 4})
			after, err := pb.NewAuthClient(s.Conn).AuthStatus(t.Context(), &pb.AuthStatusRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if !after.Enabled || after.AuthRevision != before.AuthRevision {
				t.Errorf("enabled %v at auth revision %d, want true at %d", after.Enabled, after.AuthRevision, before.AuthRevision)
			}
			if _, err := s.KV.Put(t.Context(), &pb.PutRequest{Key: []byte("a")}); status.Code(err) != codes.InvalidArgument {
				t.Errorf("who says nothing: %v, want %v", err, rpctypes.ErrGRPCUserEmpty)
			}
			ann = login(t, s, "ann", annPassword)
			if _, err := s.KV.Put(ann, &pb.PutRequest{Key: []byte("ab")}); err != nil {
				t.Error(err)
			}
			if _, err := s.KV.Put(ann, &pb.PutRequest{Key: []byte("b")}); status.Code(err) != codes.PermissionDenied {
				t.Errorf("a key of others: %v, want %v", err, rpctypes.ErrGRPCPermissionDenied)
			}
		})
	}
}

// The history says who: the user, not only the certificate.
func TestTheAuthorOfAChangeIsItsUser(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "data")
	s := start.QuireIn(t, dir, start.Options{BcryptCost: 4})
	put(t, s, &pb.PutRequest{Key: []byte("a1")})
	root, ann := withAuth(t, s)
	if _, err := s.KV.Put(ann, &pb.PutRequest{Key: []byte("a1")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.KV.DeleteRange(root, &pb.DeleteRangeRequest{Key: []byte("a1")}); err != nil {
		t.Fatal(err)
	}
	rows := column(t, dir, "SELECT op||' '||key||' by '||author FROM history ORDER BY revision")
	if got, want := strings.Join(rows, "|"), "put a1 by |put a1 by ann|delete a1 by root"; got != want {
		t.Errorf("history %q, want %q", got, want)
	}
}

// Neither passwords nor tokens are written anywhere: hashes are.
func TestPasswordsAndTokensAreKeptAsHashesOnly(t *testing.T) {
	t.Parallel()
	if start.OnPostgres(t) {
		t.Skip("reads the files of the data directory")
	}
	dir := filepath.Join(t.TempDir(), "data")
	// Every request is slow enough to be logged.
	s := start.QuireIn(t, dir, start.Options{BcryptCost: 4}, "--log-level=debug", "--warning-unary-request-duration=1ns")
	_, ann := withAuth(t, s)
	md, _ := metadata.FromOutgoingContext(ann)
	token := md.Get(rpctypes.TokenFieldNameGRPC)[0]
	letters, _, _ := strings.Cut(token, ".")
	if _, err := s.KV.Put(ann, &pb.PutRequest{Key: []byte("a"), Value: []byte("the-value-of-a")}); err != nil {
		t.Fatal(err)
	}
	_, err := pb.NewAuthClient(s.Conn).Authenticate(t.Context(), &pb.AuthenticateRequest{Name: "ann", Password: "a-wrong-password"})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a wrong password: %v", err)
	}
	stop(t, s, syscall.SIGTERM)
	secrets := []string{rootPassword, annPassword, "a-wrong-password", letters}
	log := s.Process.Output()
	if !strings.Contains(log, "request stats") {
		t.Error("nothing was logged of the requests")
	}
	if n := strings.Count(log, "invalid authentication was requested"); n != 1 {
		t.Errorf("a wrong password was logged %d times, want once", n)
	}
	for _, secret := range append(secrets, "the-value-of-a") {
		if strings.Contains(log, secret) {
			t.Errorf("the log has %q", secret)
		}
	}
	files, read := 0, 0
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		files, read = files+1, read+len(content)
		for _, secret := range secrets {
			if bytes.Contains(content, []byte(secret)) {
				t.Errorf("%s has %q", path, secret)
			}
		}
		return err
	})
	if err != nil || files == 0 || read == 0 {
		t.Fatalf("%d bytes in %d files: %v", read, files, err)
	}
}

// etcd looks at the quota first: there whoever can connect can stop all writes with one large Put.
func TestWhoMayNotWriteRaisesNoAlarm(t *testing.T) {
	t.Parallel()
	s := start.Quire(t, start.Options{BcryptCost: 4, QuotaBytes: 64 << 10})
	root, ann := withAuth(t, s)
	big := make([]byte, 256<<10)
	if _, err := s.KV.Put(ann, &pb.PutRequest{Key: []byte("b"), Value: big}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a large Put elsewhere: %v, want %v", err, rpctypes.ErrGRPCPermissionDenied)
	}
	if _, err := s.KV.Put(t.Context(), &pb.PutRequest{Key: []byte("b"), Value: big}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a large Put by nobody: %v, want %v", err, rpctypes.ErrGRPCUserEmpty)
	}
	alarms, err := s.Maintenance.Alarm(root, &pb.AlarmRequest{})
	if err != nil || len(alarms.Alarms) > 0 {
		t.Errorf("alarms %v, %v", alarms.GetAlarms(), err)
	}
	if _, err := s.KV.Put(ann, &pb.PutRequest{Key: []byte("a"), Value: big}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a large Put: %v, want %v", err, rpctypes.ErrGRPCNoSpace)
	}
}

// A token of one process is good at all others at once.
func TestATokenIsGoodEverywhere(t *testing.T) {
	n := 3
	if !start.OnPostgres(t) && !start.OnRaft(t) {
		t.Skip("several quires with the same data need QUIRE_STORAGE=postgres or sqlraft")
	}
	s := start.Several(n)(t, start.Options{BcryptCost: 4})
	withAuth(t, s)
	for i := range 60 {
		ctx := login(t, s.Processes[i%n], "ann", annPassword)
		p := s.Processes[(i+1)%n]
		if _, err := p.KV.Range(ctx, &pb.RangeRequest{Key: []byte("a"), Serializable: i%2 == 0}); err != nil {
			t.Fatalf("login %d: %v", i, err)
		}
		if _, err := p.KV.Put(ctx, &pb.PutRequest{Key: []byte("a")}); err != nil {
			t.Fatalf("login %d: %v", i, err)
		}
	}
}

// With --client-cert-auth a user is whoever their certificate names, without any password. A token goes before it, and the
// JSON gateway, which knows no certificates, refuses those who bring one with a name instead of taking them for nobody.
func TestUsersAreKnownByTheirCertificates(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	certFile, keyFile := ca.issue(t.TempDir(), "server", 2)
	address := ports.FreeAddress(t)
	data := filepath.Join(t.TempDir(), "d")
	p := start.Run(t, nil, append(start.StorageFlags(t, data), "--data-dir="+data, "--bcrypt-cost=4",
		"--listen-client-urls=https://"+address, "--advertise-client-urls=https://"+address,
		"--cert-file="+certFile, "--key-file="+keyFile, "--trusted-ca-file="+ca.file, "--client-cert-auth")...)
	if err := p.WaitReady(30 * time.Second); err != nil {
		t.Fatalf("%v\n%s", err, p.Output())
	}
	as := func(name string) *start.Server {
		conn, err := start.Dial(address, ca.client(name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return &start.Server{Conn: conn, KV: pb.NewKVClient(conn)}
	}
	gateway := func(name string) int {
		c := http.Client{Transport: &http.Transport{TLSClientConfig: ca.client(name), DisableKeepAlives: true}}
		r, err := c.Post("https://"+address+"/v3/kv/range", "application/json", strings.NewReader(`{"key":"YQ=="}`))
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		return r.StatusCode
	}
	if code := gateway("ann"); code != http.StatusOK {
		t.Errorf("the gateway while auth is off: %d", code)
	}
	ann, root, nobody := as("ann"), as("root"), as("nobody")
	withAuth(t, ann)
	key := func(k string) *pb.PutRequest { return &pb.PutRequest{Key: []byte(k)} }
	if _, err := ann.KV.Put(t.Context(), key("a")); err != nil {
		t.Error(err)
	}
	if _, err := ann.KV.Put(t.Context(), key("b")); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a key of others: %v", err)
	}
	if _, err := root.KV.Put(t.Context(), key("b")); err != nil {
		t.Error(err)
	}
	if _, err := nobody.KV.Put(t.Context(), key("a")); status.Code(err) != codes.PermissionDenied {
		t.Errorf("by a name that is no user's: %v", err)
	}
	// Root's token on ann's connection.
	if _, err := ann.KV.Put(login(t, ann, "root", rootPassword), key("b2")); err != nil {
		t.Error(err)
	}
	if _, err := root.KV.Put(metadata.AppendToOutgoingContext(t.Context(), "token", "none"), key("b")); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a token of nobody: %v", err)
	}
	if code := gateway("ann"); code != http.StatusBadRequest {
		t.Errorf("the gateway with a certificate: %d", code)
	}
	rows := column(t, data, "SELECT key||' by '||author FROM history ORDER BY revision")
	if got, want := strings.Join(rows, "|"), "a by ann|b by root|b2 by root"; got != want {
		t.Errorf("history %q, want %q", got, want)
	}
}
