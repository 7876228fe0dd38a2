package main

import (
	"net/http"
	"net/http/pprof"
	"runtime"
	"sync"
	"time"
)

// blockProfileRate is how much waiting gives one sample on average. Shorter waits are recorded as seldom as is fair.
const blockProfileRate = 10 * time.Microsecond

// blockProfile serves what goroutines wait for. To record it costs each wait its stack, so that it is recorded only while a
// request measures it, with ?seconds=.
func blockProfile() http.HandlerFunc {
	profile := pprof.Handler("block")
	var one sync.Mutex // so that one request does not end the recording of another
	return func(w http.ResponseWriter, r *http.Request) {
		one.Lock()
		defer one.Unlock()
		runtime.SetBlockProfileRate(int(blockProfileRate.Nanoseconds()))
		defer runtime.SetBlockProfileRate(0)
		profile.ServeHTTP(w, r)
	}
}
