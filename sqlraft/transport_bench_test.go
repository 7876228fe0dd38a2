package sqlraft

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/raft/v3/raftpb"
)

// BenchmarkStream sends MsgApp with one entry each from one member to another, answered by a MsgAppResp for each batch
// that has arrived, with so many under way. It reports the CPU time of the whole process: both members and the kernel.
func BenchmarkStream(b *testing.B) {
	for _, secure := range []bool{false, true} {
		for _, size := range []int{1 << 10, 64 << 10} {
			for _, inflight := range []int{1, 64} {
				b.Run(fmt.Sprintf("tls=%t/bytes=%d/inflight=%d", secure, size, inflight), func(b *testing.B) {
					benchmarkStream(b, secure, size, inflight)
				})
			}
		}
	}
}

func benchmarkStream(b *testing.B, secure bool, size, inflight int) {
	all := make([]*testMember, 2)
	if secure {
		ca := newTestCA(b, "ca")
		for i := range all {
			all[i] = newSecureMember(b, uint64(i+1), ca.config(b, "n"), ca.config(b, "n"))
		}
	} else {
		for i := range all {
			all[i] = newTestMember(b, uint64(i+1), "127.0.0.1:0", nil)
		}
	}
	introduce(all...)
	connectedToEachOther(b, all...)
	leader, follower := all[0], all[1]
	answered := make(chan struct{}, inflight)
	follower.mu.keep, leader.mu.keep = false, false
	var got atomic.Uint64
	follower.mu.seen = func(p packet) {
		n := got.Add(1)
		from, to := uint64(2), uint64(1)
		follower.send([]packet{{from: 2, to: 1, message: &raftpb.Message{Type: raftpb.MsgAppResp.Enum(), From: &from, To: &to, Index: &n}}})
	}
	leader.mu.seen = func(packet) { answered <- struct{}{} }

	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	before := cpuTime(b)
	sent, done := 0, 0
	for done < b.N {
		var batch []packet
		for sent < b.N && sent-done < inflight {
			sent++
			batch = append(batch, entries(1, 2, uint64(sent), size))
		}
		leader.send(batch)
		<-answered
		done++
		for more := true; more && done < sent; {
			select {
			case <-answered:
				done++
			default:
				more = false
			}
		}
	}
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N)/1000, "cpu-us/op")
	if n := with(leader, func() int { return leader.mu.dropped }); n > 0 {
		b.Fatalf("%d packets were dropped", n)
	}
}

func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkPacket encodes and decodes.
func BenchmarkPacket(b *testing.B) {
	for _, size := range []int{0, 1 << 10, 64 << 10} {
		p := entries(1, 2, 7, size)
		if size == 0 {
			p = heartbeat(1, 2, 7)
		}
		b.Run(fmt.Sprint("bytes=", size), func(b *testing.B) {
			b.ReportAllocs()
			var f frame
			var body []byte
			for range b.N {
				if err := f.encode(&p); err != nil {
					b.Fatal(err)
				}
				body = append(body[:0], f.buf[frameHeader:]...)
				for _, big := range f.big {
					body = append(body, big.data...)
				}
				if _, err := decode(body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
