package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// stackProfile is what net/http/pprof answers with, as far as it is used here (proto/profile.proto of github.com/google/pprof).
type stackProfile struct {
	samples []stackSample
	seconds float64
}

// stackSample is a stack and what was counted for it.
type stackSample struct {
	stack  []string // names of functions, the one that ran first; inlined ones are there too
	values []int64  // in the profile's own units: samples and ns, objects and bytes, waits and ns
}

// Field numbers of profile.proto.
const (
	profileSample   = 2
	profileLocation = 4
	profileFunction = 5
	profileStrings  = 6
	profileDuration = 10
	sampleLocations = 1
	sampleValues    = 2
	locationID      = 1
	locationLine    = 4
	lineFunction    = 1
	functionID      = 1
	functionName    = 2
)

// parseProfile decodes a profile, compressed as it is sent.
func parseProfile(compressed []byte) (*stackProfile, error) {
	unzip, err := gzip.NewReader(bytes.NewReader(compressed))
	if err != nil {
		return nil, fmt.Errorf("a profile: %w", err)
	}
	raw, err := io.ReadAll(unzip)
	if err != nil {
		return nil, fmt.Errorf("a profile: %w", err)
	}
	type sample struct{ locations, values []uint64 }
	var (
		p         = &stackProfile{}
		samples   []sample
		locations = map[uint64][]uint64{} // functions, the innermost first
		functions = map[uint64]uint64{}   // index of the name
		names     []string
		inner     error
	)
	within := func(message []byte, f func(num protowire.Number, v uint64, b []byte)) {
		if err := fields(message, f); err != nil && inner == nil {
			inner = err
		}
	}
	// repeated appends the numbers of a repeated field: packed in bytes, or one by one.
	repeated := func(to []uint64, one uint64, packed []byte) []uint64 {
		if packed == nil {
			return append(to, one)
		}
		for len(packed) > 0 {
			v, n := protowire.ConsumeVarint(packed)
			if n < 0 {
				inner = protowire.ParseError(n)
				return to
			}
			to, packed = append(to, v), packed[n:]
		}
		return to
	}
	within(raw, func(num protowire.Number, v uint64, b []byte) {
		switch num {
		case profileSample:
			var s sample
			within(b, func(num protowire.Number, v uint64, b []byte) {
				switch num {
				case sampleLocations:
					s.locations = repeated(s.locations, v, b)
				case sampleValues:
					s.values = repeated(s.values, v, b)
				}
			})
			samples = append(samples, s)
		case profileLocation:
			var id uint64
			var called []uint64
			within(b, func(num protowire.Number, v uint64, b []byte) {
				switch num {
				case locationID:
					id = v
				case locationLine:
					within(b, func(num protowire.Number, v uint64, _ []byte) {
						if num == lineFunction {
							called = append(called, v)
						}
					})
				}
			})
			locations[id] = called
		case profileFunction:
			var id, name uint64
			within(b, func(num protowire.Number, v uint64, _ []byte) {
				switch num {
				case functionID:
					id = v
				case functionName:
					name = v
				}
			})
			functions[id] = name
		case profileStrings:
			names = append(names, string(b))
		case profileDuration:
			p.seconds = time.Duration(v).Seconds()
		}
	})
	if inner != nil {
		return nil, fmt.Errorf("a profile: %w", inner)
	}
	for _, s := range samples {
		var out stackSample
		for _, l := range s.locations {
			for _, f := range locations[l] {
				name := functions[f]
				if name >= uint64(len(names)) {
					return nil, fmt.Errorf("a profile names function %d, it has %d names", name, len(names))
				}
				out.stack = append(out.stack, names[name])
			}
		}
		for _, v := range s.values {
			out.values = append(out.values, int64(v))
		}
		if len(out.stack) > 0 && len(out.values) > 1 && !slices.ContainsFunc(out.stack, isProfiler) {
			p.samples = append(p.samples, out)
		}
	}
	return p, nil
}

// isProfiler: the function takes profiles, which is not the server's work.
func isProfiler(function string) bool {
	return strings.HasPrefix(function, "net/http/pprof.") || strings.HasPrefix(function, "runtime/pprof.")
}

// minus is what was added to a profile that counts from the start of the process, since an earlier one of it was taken.
func (p *stackProfile) minus(earlier *stackProfile) *stackProfile {
	sums := map[string]*stackSample{} // there are several samples of one stack: one for each size of object
	add := func(samples []stackSample, sign int64) {
		for _, s := range samples {
			key := strings.Join(s.stack, "\n")
			if sums[key] == nil {
				sums[key] = &stackSample{s.stack, []int64{0, 0}}
			}
			sums[key].values[0] += sign * s.values[0]
			sums[key].values[1] += sign * s.values[1]
		}
	}
	add(p.samples, 1)
	add(earlier.samples, -1)
	d := &stackProfile{}
	for _, key := range slices.Sorted(maps.Keys(sums)) {
		if s := sums[key]; s.values[0] > 0 {
			d.samples = append(d.samples, *s)
		}
	}
	return d
}

// share is what some samples add up to.
type share struct {
	name   string
	first  float64 // sum of the profile's first values
	second float64 // of its second ones
}

// total adds up all samples.
func (p *stackProfile) total() share {
	t := share{name: "all"}
	for _, s := range p.samples {
		t.first += float64(s.values[0])
		t.second += float64(s.values[1])
	}
	return t
}

// by adds the samples up by what name makes of their stacks, the largest second value first.
func (p *stackProfile) by(name func(stack []string) string) []share {
	at := map[string]int{}
	var sums []share
	for _, s := range p.samples {
		n := name(s.stack)
		i, ok := at[n]
		if !ok {
			i = len(sums)
			at[n] = i
			sums = append(sums, share{name: n})
		}
		sums[i].first += float64(s.values[0])
		sums[i].second += float64(s.values[1])
	}
	slices.SortStableFunc(sums, func(a, b share) int { return cmp.Compare(b.second, a.second) })
	return sums
}
