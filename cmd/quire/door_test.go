package main

import (
	"bytes"
	"io"
	"net"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// frames writes the preface and what f adds.
func frames(t *testing.T, f func(*http2.Framer) error) []byte {
	t.Helper()
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	if err := f(http2.NewFramer(&b, nil)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestAckFilterDropsOneAcknowledgement(t *testing.T) {
	write := func(acks int) func(*http2.Framer) error {
		return func(f *http2.Framer) error {
			if err := f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20}); err != nil {
				return err
			}
			if err := f.WriteData(1, false, []byte("payload that has \x00\x00\x00\x04\x01\x00\x00\x00\x00 in it")); err != nil {
				return err
			}
			for range acks {
				if err := f.WriteSettingsAck(); err != nil {
					return err
				}
			}
			return f.WriteData(1, true, nil)
		}
	}
	for name, slow := range map[string]func(io.Reader) io.Reader{
		"whole": func(r io.Reader) io.Reader { return r }, "byte by byte": iotest.OneByteReader, "with the error": iotest.DataErrReader,
	} {
		for acks := range 3 {
			got, err := io.ReadAll(&ackFilter{src: slow(bytes.NewReader(frames(t, write(acks)))), pass: len(http2.ClientPreface)})
			if want := frames(t, write(max(acks-1, 0))); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s, %d acknowledgements: %d bytes, %v; want %d bytes", name, acks, len(got), err, len(want))
			}
		}
	}
}

// What decides, and that nothing of what was read is lost.
func TestSniff(t *testing.T) {
	header := func(contentType string) func(*http2.Framer) error {
		return func(f *http2.Framer) error {
			var block bytes.Buffer
			enc := hpack.NewEncoder(&block)
			for _, h := range []hpack.HeaderField{{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/"}, {Name: "content-type", Value: contentType}} {
				if err := enc.WriteField(h); err != nil {
					return err
				}
			}
			if err := f.WriteSettings(); err != nil {
				return err
			}
			if err := f.WriteRawFrame(0x2a, 0, 0, []byte("unknown frames are ignored")); err != nil {
				return err
			}
			// Split, so that it takes a CONTINUATION.
			b := block.Bytes()
			if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: b[:5]}); err != nil {
				return err
			}
			return f.WriteContinuation(1, true, b[5:])
		}
	}
	for _, x := range []struct {
		name string
		sent []byte
		grpc bool
		h2   bool
	}{
		{"gRPC", frames(t, header("application/grpc")), true, true},
		{"gRPC with a subtype", frames(t, header("application/grpc+proto")), true, true},
		{"gRPC-Web", frames(t, header("application/grpc-web")), false, true},
		{"JSON", frames(t, header("application/json")), false, true},
		{"HTTP/1.1", []byte("GET / HTTP/1.1\r\n\r\n"), false, false},
		{"a method that begins like the preface", []byte("PRIx / HTTP/1.1\r\n\r\n"), false, false},
		{"keep-alive before any request", frames(t, func(f *http2.Framer) error { return f.WritePing(false, [8]byte{}) }), true, true},
		{"a frame that is too large", frames(t, func(f *http2.Framer) error { return f.WriteData(1, false, make([]byte, 20<<10)) }), true, true},
		{"frames without end", frames(t, func(f *http2.Framer) error {
			for range 20 {
				if err := f.WriteRawFrame(0x2a, 0, 0, make([]byte, 16<<10)); err != nil {
					return err
				}
			}
			return nil
		}), true, true},
		{"silence after SETTINGS", frames(t, func(f *http2.Framer) error { return f.WriteSettings() }), true, true},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel() // the silent one takes a second
			client, server := net.Pipe()
			defer client.Close()
			go io.Copy(io.Discard, client)
			go client.Write(x.sent)
			d := &door{grpc: newConnQueue(nil), http: newConnQueue(nil)}
			to, read, h2, err := d.sniff(server)
			if err != nil {
				t.Fatal(err)
			}
			if (to == d.grpc) != x.grpc || h2 != x.h2 || !bytes.HasPrefix(x.sent, read) {
				t.Errorf("gRPC %v, HTTP/2 %v, %d bytes read; want %v, %v", to == d.grpc, h2, len(read), x.grpc, x.h2)
			}
			if err := server.SetDeadline(time.Time{}); err != nil {
				t.Fatal(err)
			}
			rest := make([]byte, len(x.sent)-len(read))
			if _, err := io.ReadFull(server, rest); err != nil || !bytes.Equal(append(read, rest...), x.sent) {
				t.Errorf("bytes were lost: %v", err)
			}
		})
	}
}
