package main

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

func TestNumbersHaveThreeDigits(t *testing.T) {
	if got := number3(math.NaN()); got != "–" {
		t.Errorf("no figure is written as %q", got)
	}
	for v, want := range map[float64]string{
		0: "0", 0.01234: "0.0123", 0.5: "0.500", 1: "1.00", 12.34: "12.3", 123.4: "123", 1234: "1 230", 18123: "18 100", 1234567: "1 230 000",
	} {
		if got := number3(v); got != want {
			t.Errorf("number3(%v) = %q, expected %q", v, got, want)
		}
	}
}

func TestRatioAboveOneIsBetter(t *testing.T) {
	if r := ratioTo(200, 100, true); r != 2 {
		t.Errorf("twice as many operations: %v", r)
	}
	if r := ratioTo(200, 100, false); r != 0.5 {
		t.Errorf("twice as slow: %v", r)
	}
	if r := ratioTo(0, 100, false); !math.IsNaN(r) {
		t.Errorf("nothing has no ratio, got %v", r)
	}
}

func TestTableShowsMediansRatiosAndFailures(t *testing.T) {
	rows := []row{{
		w: workload{name: "put", metrics: []metric{{unit: "ops/s", more: true}, {unit: "ms"}}},
		cells: map[string]*cell{
			"quire": {rounds: [][]float64{{300, 1}, {100, 3}, {200, 2}}},
			"etcd":  {rounds: [][]float64{{100, 4}, {100, 4}}},
			"kine":  {err: errors.New("no | service")},
		},
	}}
	want := "| | unit | quire | etcd | kine |\n|---|---|---:|---:|---:|\n" +
		"| put | ops/s | 200 (2.00) | 100 (1.00) [2 rounds] | fails: no / service |\n" +
		"|  | ms | 2.00 (2.00) | 4.00 (1.00) [2 rounds] | fails |\n"
	if got := table([]string{"quire", "etcd", "kine"}, rows, 3); got != want {
		t.Errorf("got\n%s\nexpected\n%s", got, want)
	}
}

func TestInsertLeavesTheRestAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "performance.md")
	for _, text := range []string{"first", "second"} {
		if err := insert(path, benchMarks, text); err != nil {
			t.Fatal(err)
		}
		if text == "first" {
			doc, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, append([]byte("above\n"), append(doc, "below\n"...)...), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s := string(doc)
	if strings.Contains(s, "first") || !strings.Contains(s, "second") || !strings.HasPrefix(s, "above\n") || !strings.HasSuffix(s, "below\n") {
		t.Errorf("the document is now:\n%s", s)
	}
	if err := os.WriteFile(path, []byte("no marks"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := insert(path, benchMarks, "third"); err == nil {
		t.Error("a document without marks was overwritten")
	}
}

func TestAnswersAreReadWithoutDecoding(t *testing.T) {
	encode := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	list := encode(&pb.RangeResponse{
		Header: &pb.ResponseHeader{ClusterId: 1 << 63, Revision: 77}, Kvs: []*mvccpb.KeyValue{{Key: []byte("a")}, {Key: []byte("b")}}, Count: 2,
	})
	if n, err := countKVs(list); n != 2 || err != nil {
		t.Errorf("countKVs: %d, %v", n, err)
	}
	if rev, err := revisionOf(list); rev != 77 || err != nil {
		t.Errorf("revisionOf: %d, %v", rev, err)
	}
	if ok, err := succeeded(encode(&pb.TxnResponse{Succeeded: true})); !ok || err != nil {
		t.Errorf("succeeded: %v, %v", ok, err)
	}
	if _, err := countKVs([]byte{0x12, 200}); err == nil {
		t.Error("a cut answer was accepted")
	}
	ws := &watchStream{answer: encode(&pb.WatchResponse{Events: []*mvccpb.Event{
		{Kv: &mvccpb.KeyValue{Key: []byte("k"), ModRevision: 5}},
		{Type: mvccpb.DELETE, Kv: &mvccpb.KeyValue{Key: []byte("gone"), ModRevision: 6}},
	}})}
	var revs []int64
	if err := ws.events(func(kv []byte) error {
		rev, err := modRevision(kv)
		revs = append(revs, rev)
		return err
	}); err != nil || len(revs) != 2 || revs[0] != 5 || revs[1] != 6 {
		t.Errorf("events: %v, %v", revs, err)
	}
	var gone []string
	if err := ws.deletes(func(key []byte) error { gone = append(gone, string(key)); return nil }); err != nil || len(gone) != 1 || gone[0] != "gone" {
		t.Errorf("deletes: %v, %v", gone, err)
	}
	ws.answer = encode(&pb.WatchResponse{Canceled: true})
	if err := ws.events(func([]byte) error { return nil }); err == nil {
		t.Error("a canceled watch was taken for a quiet one")
	}
}

func TestQuantilesAndMedians(t *testing.T) {
	d := []time.Duration{time.Millisecond, 2 * time.Millisecond, 3 * time.Millisecond, 4 * time.Millisecond}
	if q := quantile(d, 0.5); q != 3 {
		t.Errorf("p50 is %v", q)
	}
	if q := quantile(d, 1); q != 4 {
		t.Errorf("max is %v", q)
	}
	if q := quantile(nil, 0.5); q != 0 {
		t.Errorf("p50 of nothing is %v", q)
	}
	if m := medianOf([]float64{4, 1, 3, 2}); m != 2.5 {
		t.Errorf("median is %v", m)
	}
}
