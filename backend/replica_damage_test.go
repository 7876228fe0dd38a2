package backend

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// TestAMemberThatReadsDamageFails: a start does not read every value, so damage to one is found when it is asked for. The
// member says so once, with the file's name, and applies nothing from then on.
func TestAMemberThatReadsDamageFails(t *testing.T) {
	for name, read := range map[string]func(db *DB) error{
		"a reader": func(db *DB) error {
			v := db.View()
			defer v.Release()
			_, err := v.Range(context.Background(), &pb.RangeRequest{Key: []byte("k")})
			return err
		},
		"a hash": func(db *DB) error {
			_, _, err := db.HashRows(context.Background(), 0, db.Revision())
			return err
		},
		"a watcher": func(db *DB) error {
			_, err := db.History(context.Background(), HistoryRequest{From: 1, Key: []byte{0}, RangeEnd: []byte{0}})
			return err
		},
		"a background step": func(db *DB) error {
			_, err := db.step(func() error {
				return &sqliteError{Code: 11, Extended: 11, Op: "step", Msg: "database disk image is malformed"}
			})
			return db.log.explain(err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := testPath(t)
			db, err := openLoopback(t.Context(), path, Options{})
			if err != nil {
				t.Fatal(err)
			}
			value := bytes.Repeat([]byte("0123456789"), 5000)
			mustWrite(t, db, &pb.PutRequest{Key: []byte("k"), Value: value})
			mustWrite(t, db, &pb.PutRequest{Key: []byte("other")})
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			damageChain(t, path, value)

			failed := make(chan error, 2)
			o := Options{ValueCacheBytes: 1}
			o.Hooks.Failed = func(err error) { failed <- err }
			db, err = openLoopback(t.Context(), path, o)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if err := read(db); !errors.Is(err, ErrDamaged) {
				t.Fatalf("got %v", err)
			}
			select {
			case err := <-failed:
				if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), path) {
					t.Errorf("the member fails with %v", err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("nobody was told that the member cannot go on")
			}
			if _, err := db.Write(t.Context(), Command{Request: putReq("a", "1")}); !errors.Is(err, ErrDamaged) {
				t.Errorf("a write afterwards says %v", err)
			}
			_ = read(db)
			select {
			case err := <-failed:
				t.Errorf("it fails a second time, with %v", err)
			default:
			}
		})
	}
}

// damageChain breaks the chain of pages in which a long value lies.
func damageChain(t *testing.T, path string, value []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	size := int(binary.BigEndian.Uint16(data[16:]))
	found := 0
	for page := 0; page+size <= len(data); page += size {
		// Such a page begins with the number of the next one.
		if next := binary.BigEndian.Uint32(data[page:]); next != 0 && bytes.Contains(value, data[page+4:page+size]) {
			binary.BigEndian.PutUint32(data[page:], 1<<30)
			found++
		}
	}
	if found < 2 {
		t.Fatalf("%d pages hold the value alone", found)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
