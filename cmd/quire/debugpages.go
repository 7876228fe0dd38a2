package main

import (
	"encoding/json"
	"expvar"
	"fmt"
	"net/http"
	"net/http/pprof"
	"runtime"

	"golang.org/x/net/trace"
)

// debugPages are what etcd serves below /debug/.
type debugPages struct {
	Profiles bool // --enable-pprof, or the log level debug
	Requests bool // the log level debug
	// Raft is shown in /debug/vars.
	Raft func() raftVars
}

// raftVars has etcd's names.
type raftVars struct {
	ID      string `json:"id"` // hexadecimal
	Term    uint64 `json:"term"`
	Commit  uint64 `json:"commit"`
	Applied uint64 `json:"applied"`
	Lead    string `json:"lead"`
	State   string `json:"raftState"`
}

func (d *debugPages) install(mux *http.ServeMux) {
	mux.HandleFunc("/debug/vars", d.vars)
	if d.Profiles {
		if runtime.SetMutexProfileFraction(-1) == 0 {
			runtime.SetMutexProfileFraction(5) // of waits for a mutex, as in etcd
		}
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/block", blockProfile())
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	if d.Requests {
		// Who may ask for it may see it all: there are no values in it.
		mux.HandleFunc("/debug/requests", func(w http.ResponseWriter, r *http.Request) { trace.Render(w, r, true) })
		mux.HandleFunc("/debug/events", func(w http.ResponseWriter, r *http.Request) { trace.RenderEvents(w, r, true) })
	}
}

// vars are those of the process and, as in etcd, of Raft and the limit on open files.
func (d *debugPages) vars(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
		return
	}
	all := map[string]json.RawMessage{}
	add := func(name string, v any) {
		text, err := json.Marshal(v)
		if err != nil {
			panic(fmt.Sprintf("cannot encode a %T: %v", v, err)) // only our own plain values come here
		}
		all[name] = text
	}
	expvar.Do(func(kv expvar.KeyValue) { all[kv.Key] = json.RawMessage(kv.Value.String()) })
	add("raft.status", d.Raft())
	add("file_descriptor_limit", fileLimit())
	text, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_, _ = w.Write(append(text, '\n')) // the client has left
}
