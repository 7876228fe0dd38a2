package conformance

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/gorilla/websocket"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/quire-db/quire/test/etcd/start"
)

// post asks the JSON gateway and returns the status and what is said, decoded.
func (x *exam) post(path, body string) (status int, answer map[string]any) {
	x.Helper()
	r, err := http.NewRequestWithContext(x.ctx, http.MethodPost, x.URL(path), strings.NewReader(body))
	if err != nil {
		x.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		x.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		x.Fatal(err)
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		x.Fatalf("%s %s is answered with %q: %v", path, body, text, err)
	}
	return resp.StatusCode, answer
}

// said asks for something that is granted, and returns the answer without its header, as sorted JSON.
func (x *exam) said(path, body string) string {
	x.Helper()
	status, answer := x.post(path, body)
	if status != http.StatusOK {
		x.Fatalf("%s %s: status %d, %v", path, body, status, answer)
	}
	if header, ok := answer["header"].(map[string]any); !ok || header["cluster_id"] == "" || header["revision"] == "" {
		x.Errorf("%s %s: header %v", path, body, answer["header"])
	}
	delete(answer, "header")
	return encoded(x, answer)
}

func encoded(x *exam, v any) string {
	x.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		x.Fatal(err)
	}
	return string(text)
}

func base(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// events are those of a watch response in JSON: key=value, or key alone.
func events(x *exam, line []byte) (created bool, all []string) {
	x.Helper()
	var r struct {
		Result struct {
			Created bool
			Events  []struct {
				Type string
				Kv   struct{ Key, Value []byte }
			}
		}
	}
	if err := json.Unmarshal(line, &r); err != nil {
		x.Fatalf("%q: %v", line, err)
	}
	for _, e := range r.Result.Events {
		all = append(all, fmt.Sprintf("%s%s=%s", e.Type, e.Kv.Key, e.Kv.Value))
	}
	return r.Result.Created, all
}

var gatewayCases = []testCase{
	{name: "KV in JSON", run: func(x *exam) {
		equal(x, "a put", x.said("/v3/kv/put", fmt.Sprintf(`{"key":%q,"value":%q}`, base("k"), base("one"))), `{}`)
		equal(x, "a put with what was there", x.said("/v3/kv/put", fmt.Sprintf(`{"key":%q,"value":%q,"prev_kv":true}`, base("k"), base("two"))),
			`{"prev_kv":{"create_revision":"2","key":"aw==","mod_revision":"2","value":"b25l","version":"1"}}`)
		equal(x, "a range", x.said("/v3/kv/range", fmt.Sprintf(`{"key":%q}`, base("k"))),
			`{"count":"1","kvs":[{"create_revision":"2","key":"aw==","mod_revision":"3","value":"dHdv","version":"2"}]}`)
		equal(x, "a range of nothing", x.said("/v3/kv/range", fmt.Sprintf(`{"key":%q}`, base("none"))), `{}`)
		equal(x, "fields by their other names, numbers without quotes, fields that there are not",
			x.said("/v3/kv/range", fmt.Sprintf(`{"key":%q,"rangeEnd":%q,"limit":1,"countOnly":true,"whatever":1}`, base("a"), base("z"))), `{"count":"1"}`)
		equal(x, "a txn", x.said("/v3/kv/txn", fmt.Sprintf(
			`{"compare":[{"key":%q,"target":"VERSION","result":"GREATER","version":1}],"success":[{"request_put":{"key":%q}},{"request_range":{"key":%q,"keys_only":true}}]}`,
			base("k"), base("new"), base("new"))),
			`{"responses":[{"response_put":{"header":{"revision":"4"}}},{"response_range":{"count":"1","header":{"revision":"4"},"kvs":[{"create_revision":"4","key":"bmV3","mod_revision":"4","version":"1"}]}}],"succeeded":true}`)
		equal(x, "a delete", x.said("/v3/kv/deleterange", fmt.Sprintf(`{"key":%q}`, base("new"))), `{"deleted":"1"}`)
		equal(x, "a compaction", x.said("/v3/kv/compaction", `{"revision":3,"physical":true}`), `{}`)
	}},

	{name: "leases, cluster, maintenance, lock and election in JSON", run: func(x *exam) {
		equal(x, "a grant", x.said("/v3/lease/grant", `{"ID":77,"TTL":1000}`), `{"ID":"77","TTL":"1000"}`)
		equal(x, "leases", x.said("/v3/lease/leases", `{}`), `{"leases":[{"ID":"77"}]}`)
		equal(x, "the granted time", strings.Contains(x.said("/v3/lease/timetolive", `{"ID":77}`), `"grantedTTL":"1000"`), true)
		status, answer := x.post("/v3/lease/keepalive", `{"ID":77}`) // a stream
		equal(x, "status of a keepalive", status, http.StatusOK)
		if result, ok := answer["result"].(map[string]any); !ok || result["TTL"] != "1000" {
			x.Errorf("a keepalive is answered with %v", answer)
		}
		equal(x, "a revocation", x.said("/v3/lease/revoke", `{"ID":77}`), `{}`)
		if text := x.said("/v3/cluster/member/list", `{}`); !strings.Contains(text, `"clientURLs":["http://`) {
			x.Errorf("members are %s", text)
		}
		if text := x.said("/v3/maintenance/status", `{}`); !strings.Contains(text, `"version":"3.`) || !strings.Contains(text, `"dbSize":"`) {
			x.Errorf("the status is %s", text)
		}
		if text := x.said("/v3/lock/lock", fmt.Sprintf(`{"name":%q}`, base("name"))); !strings.Contains(text, `"key":"`) {
			x.Errorf("a lock is %s", text)
		}
		if text := x.said("/v3/election/campaign", fmt.Sprintf(`{"name":%q,"value":%q}`, base("e"), base("v"))); !strings.Contains(text, `"leader":{`) {
			x.Errorf("a campaign is %s", text)
		}
	}},

	{name: "errors of the JSON gateway have a status and etcd's text", run: func(x *exam) {
		for _, c := range []struct {
			path, body string
			status     int
			want       string
		}{
			{"/v3/kv/range", `{}`, 400, `{"code":3,"message":"etcdserver: key is not provided"}`},
			{"/v3/kv/range", `{"key":"aw==","revision":99}`, 400, `{"code":11,"message":"etcdserver: mvcc: required revision is a future revision"}`},
			{"/v3/lease/revoke", `{"ID":5}`, 404, `{"code":5,"message":"etcdserver: requested lease not found"}`},
			{"/v3/kv/nothing", `{}`, 404, `{"code":5,"message":"Not Found"}`},
		} {
			status, answer := x.post(c.path, c.body)
			delete(answer, "details")
			if got := encoded(x, answer); status != c.status || got != c.want {
				x.Errorf("%s %s: status %d, %s, want %d, %s", c.path, c.body, status, got, c.status, c.want)
			}
		}
		status, _ := x.post("/v3/kv/range", `{"key":`)
		equal(x, "status of what is no JSON", status, 400)
		status, _ = x.post("/v3/kv/range", `{"key":"not base 64"}`)
		equal(x, "status of a key that is not base 64", status, 400)
		r, err := x.Get(x.ctx, "/v3/kv/range")
		if err != nil {
			x.Fatal(err)
		}
		defer r.Body.Close()
		equal(x, "status of a GET", r.StatusCode, http.StatusNotImplemented)
	}},

	{name: "a watch in JSON has a line for each response", run: func(x *exam) {
		ctx, cancel := context.WithCancel(x.ctx)
		defer cancel()
		body := fmt.Sprintf(`{"create_request":{"key":%q,"range_end":%q}}`, base("a"), base("b"))
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, x.URL("/v3/watch"), strings.NewReader(body))
		if err != nil {
			x.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			x.Fatal(err)
		}
		defer resp.Body.Close()
		lines := bufio.NewScanner(resp.Body)
		next := func() (bool, string) {
			x.Helper()
			if !lines.Scan() {
				x.Fatalf("the stream has ended: %v", lines.Err())
			}
			created, all := events(x, lines.Bytes())
			return created, strings.Join(all, " ")
		}
		if created, all := next(); !created || all != "" {
			x.Fatalf("at first %v, %s", created, all)
		}
		x.put("a1", "v")
		x.put("c", "v")
		x.delete("a1")
		for _, want := range []string{"a1=v", "DELETEa1="} {
			if _, all := next(); all != want {
				x.Errorf("events %s, want %s", all, want)
			}
		}
	}},

	{name: "a watch on a websocket", run: func(x *exam) {
		conn, resp, err := websocket.DefaultDialer.DialContext(x.ctx, "ws://"+x.Address+"/v3/watch", nil)
		if err != nil {
			x.Fatal(err)
		}
		defer conn.Close()
		resp.Body.Close()
		say := func(body string) {
			x.Helper()
			if err := conn.WriteMessage(websocket.TextMessage, []byte(body)); err != nil {
				x.Fatal(err)
			}
		}
		hear := func() (bool, string) {
			x.Helper()
			_, message, err := conn.ReadMessage()
			if err != nil {
				x.Fatal(err)
			}
			created, all := events(x, message)
			return created, strings.Join(all, " ")
		}
		for _, key := range []string{"a", "b"} { // more than one request on one stream
			say(fmt.Sprintf(`{"create_request":{"key":%q}}`, base(key)))
			if created, all := hear(); !created || all != "" {
				x.Fatalf("at first %v, %s", created, all)
			}
			x.put(key, "v")
			if _, all := hear(); all != key+"=v" {
				x.Errorf("events %s", all)
			}
		}
	}},

	{name: "pages of other origins may ask", run: func(x *exam) {
		for _, path := range []string{"/v3/kv/range", "/health", "/nothing"} {
			r, err := http.NewRequestWithContext(x.ctx, http.MethodOptions, x.URL(path), nil)
			if err != nil {
				x.Fatal(err)
			}
			r.Header.Set("Origin", "http://elsewhere.example")
			resp, err := http.DefaultClient.Do(r)
			if err != nil {
				x.Fatal(err)
			}
			resp.Body.Close()
			equal(x, path+": status", resp.StatusCode, http.StatusOK)
			equal(x, path+": origin", resp.Header.Get("Access-Control-Allow-Origin"), "*")
			equal(x, path+": methods", resp.Header.Get("Access-Control-Allow-Methods"), "POST, GET, OPTIONS, PUT, DELETE")
			equal(x, path+": headers", resp.Header.Get("Access-Control-Allow-Headers"), "accept, content-type, authorization")
		}
	}},

	{name: "a large list in JSON", options: start.Options{}, run: func(x *exam) {
		value := strings.Repeat("v", 1<<20)
		for i := range 6 {
			x.putRequest(&pb.PutRequest{Key: fmt.Appendf(nil, "k%d", i), Value: []byte(value)})
		}
		status, answer := x.post("/v3/kv/range", fmt.Sprintf(`{"key":%q,"range_end":%q}`, base("k"), base("l")))
		equal(x, "status", status, http.StatusOK)
		equal(x, "count", answer["count"], any("6"))
	}},
}
