package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// waitForBlockProfile is what the test looks for in the profile.
//
//go:noinline
func waitForBlockProfile(done <-chan struct{}) { <-done }

// Nothing switches the recording on but the request itself.
func TestBlockProfileRecordsWhileItIsAskedFor(t *testing.T) {
	server := httptest.NewServer(clientHandler(http.NotFoundHandler(), nil, debugPages{Profiles: true}))
	defer server.Close()
	done := make(chan struct{})
	go func() { // waits that begin and end within the second
		defer close(done)
		for range 24 {
			wait := make(chan struct{})
			time.AfterFunc(50*time.Millisecond, func() { close(wait) })
			waitForBlockProfile(wait)
		}
	}()
	resp, err := http.Get(server.URL + "/debug/pprof/block?seconds=1")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("the answer is %s", resp.Status)
	}
	unzipped, err := gzip.NewReader(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	profile, err := io.ReadAll(unzipped)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(profile, []byte("waitForBlockProfile")) {
		t.Error("the profile of blocking does not have a wait of 50 ms")
	}
	<-done
}
