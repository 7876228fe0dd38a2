package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// rawCall is one unary gRPC request on a connection of its own, spoken frame by frame: grpc-go's client reads an answer
// whether anybody wants it or not and holds it in memory until it is whole; this one reads when it is told to and throws
// away what it has counted, so that 50 answers of 20 MB cost the load generator next to nothing.
type rawCall struct {
	conn   net.Conn
	framer *http2.Framer

	prefix   []byte // of the gRPC message: a byte for compression, four of length
	received int    // bytes of DATA, the prefix included
	owed     int    // of them, the ones that the server was not given back as window
}

const (
	rawStream    = 1
	rawWindow    = 65_535 // HTTP/2's window, of the connection and of the stream, until it is updated
	grpcPrefix   = 5
	grpcStatusOK = "0"
)

// startRawCall sends the request and reads nothing. The call ends with ctx.
func startRawCall(ctx context.Context, addr, method string, request []byte) (*rawCall, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { conn.Close() })
	c := &rawCall{conn: conn, framer: http2.NewFramer(conn, conn)}
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.framer.SetReuseFrames()
	if err := c.send(addr, method, request); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

func (c *rawCall) send(addr, method string, request []byte) error {
	if _, err := c.conn.Write([]byte(http2.ClientPreface)); err != nil {
		return err
	}
	if err := c.framer.WriteSettings(); err != nil {
		return err
	}
	var block bytes.Buffer
	headers := hpack.NewEncoder(&block)
	for _, h := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", method}, {":authority", addr},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		if err := headers.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
			return err
		}
	}
	if err := c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: rawStream, BlockFragment: block.Bytes(), EndHeaders: true}); err != nil {
		return err
	}
	message := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(request)))
	return c.framer.WriteData(rawStream, true, append(message, request...))
}

// readWindow reads until the server has used up the window and can send no more, or until the answer is whole.
func (c *rawCall) readWindow() (whole bool, err error) {
	for c.owed < rawWindow {
		if whole, err := c.readFrame(); whole || err != nil {
			return whole, err
		}
	}
	return false, nil
}

// readAll reads the rest of the answer and returns its length in bytes.
func (c *rawCall) readAll() (int, error) {
	for {
		if c.owed > rawWindow/2 {
			for _, id := range []uint32{0, rawStream} {
				if err := c.framer.WriteWindowUpdate(id, uint32(c.owed)); err != nil {
					return 0, err
				}
			}
			c.owed = 0
		}
		whole, err := c.readFrame()
		if err != nil {
			return 0, err
		}
		if whole {
			return c.received - grpcPrefix, c.conn.Close()
		}
	}
}

// readFrame reads one frame. It returns true after the last one of an answer that is whole.
func (c *rawCall) readFrame() (whole bool, err error) {
	f, err := c.framer.ReadFrame()
	if err != nil {
		return false, err
	}
	switch f := f.(type) {
	case *http2.SettingsFrame:
		if !f.IsAck() {
			return false, c.framer.WriteSettingsAck()
		}
	case *http2.PingFrame:
		if !f.IsAck() {
			return false, c.framer.WritePing(true, f.Data)
		}
	case *http2.DataFrame:
		c.received += len(f.Data())
		c.owed += int(f.Length)
		if missing := grpcPrefix - len(c.prefix); missing > 0 {
			c.prefix = append(c.prefix, f.Data()[:min(missing, len(f.Data()))]...)
		}
	case *http2.MetaHeadersFrame:
		if f.StreamEnded() {
			return true, c.check(f)
		}
	case *http2.RSTStreamFrame:
		return false, fmt.Errorf("the server ended the call: %s", f.ErrCode)
	case *http2.GoAwayFrame:
		return false, fmt.Errorf("the server ended the connection: %s", f.ErrCode)
	}
	return false, nil
}

// check looks at the trailers and at the length of what they end.
func (c *rawCall) check(trailers *http2.MetaHeadersFrame) error {
	status, message := "", ""
	for _, h := range trailers.Fields {
		switch h.Name {
		case "grpc-status":
			status = h.Value
		case "grpc-message":
			message = h.Value
		}
	}
	if status != grpcStatusOK {
		return fmt.Errorf("the call ended with status %q: %s", status, message)
	}
	if len(c.prefix) < grpcPrefix {
		return errors.New("the call ended well without an answer")
	}
	if want := grpcPrefix + int(binary.BigEndian.Uint32(c.prefix[1:])); c.received != want {
		return fmt.Errorf("an answer has %d bytes, %d were announced", c.received, want)
	}
	return nil
}
