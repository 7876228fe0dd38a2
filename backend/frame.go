package backend

import (
	"encoding/binary"
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Frame is one mvccpb.KeyValue in wire form, written as field number 2 of the message around it: the
// byte 0x12, the length as a varint, the encoded KeyValue. RangeResponse.kvs, Event.kv and
// PutResponse.prev_kv all have that number, so a Frame is made once and sent as it is.
// A Frame is shared between readers: never write to it.
type Frame []byte

// Field tags of mvccpb.KeyValue (kv.proto), and the one a Frame begins with.
const (
	tagKey            = 1<<3 | 2
	tagCreateRevision = 2 << 3
	tagModRevision    = 3 << 3
	tagVersion        = 4 << 3
	tagValue          = 5<<3 | 2
	tagLease          = 6 << 3
	tagFrame          = 2<<3 | 2
)

// keyValue is what a Frame is made of; a tombstone has only key and mod.
type keyValue struct {
	key, value                  []byte
	create, mod, version, lease int64
}

func sizeInt(v int64) int {
	if v == 0 {
		return 0
	}
	return 1 + protowire.SizeVarint(uint64(v))
}

func sizeBytes(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	return 1 + protowire.SizeBytes(len(b))
}

func (kv *keyValue) messageSize() int {
	return sizeBytes(kv.key) + sizeInt(kv.create) + sizeInt(kv.mod) + sizeInt(kv.version) + sizeBytes(kv.value) + sizeInt(kv.lease)
}

// frameSize is the number of bytes that appendFrame will write.
func (kv *keyValue) frameSize() int {
	return 1 + protowire.SizeBytes(kv.messageSize())
}

func appendInt(b []byte, tag byte, v int64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(append(b, tag), uint64(v))
}

func appendBytes(b []byte, tag byte, v []byte) []byte {
	if len(v) == 0 {
		return b
	}
	return protowire.AppendBytes(append(b, tag), v)
}

func (kv *keyValue) appendFrame(b []byte) []byte {
	b = append(b, tagFrame)
	return kv.appendMessage(protowire.AppendVarint(b, uint64(kv.messageSize())))
}

// appendMessage appends the encoded KeyValue alone.
func (kv *keyValue) appendMessage(b []byte) []byte {
	b = appendBytes(b, tagKey, kv.key)
	b = appendInt(b, tagCreateRevision, kv.create)
	b = appendInt(b, tagModRevision, kv.mod)
	b = appendInt(b, tagVersion, kv.version)
	b = appendBytes(b, tagValue, kv.value)
	return appendInt(b, tagLease, kv.lease)
}

// Message returns the encoded KeyValue without tag and length.
func (f Frame) Message() []byte {
	n, w := binary.Uvarint(f[1:])
	return f[1+w : 1+w+int(n)]
}

// KeyValue decodes the Frame into a message of its own.
func (f Frame) KeyValue() *mvccpb.KeyValue {
	kv := new(mvccpb.KeyValue)
	if err := proto.Unmarshal(f.Message(), kv); err != nil {
		panic(fmt.Sprintf("backend: a frame of %d bytes does not decode: %v", len(f), err))
	}
	return kv
}

// Key returns the key inside the Frame, nil for an empty key.
func (f Frame) Key() []byte { return f.bytesField(tagKey) }

// Value returns the value inside the Frame, nil when it is empty.
func (f Frame) Value() []byte { return f.bytesField(tagValue) }

func (f Frame) bytesField(tag byte) []byte {
	m := f.Message()
	for len(m) > 0 {
		t := m[0]
		n, w := binary.Uvarint(m[1:])
		m = m[1+w:]
		if t&7 != 2 {
			continue
		}
		if t == tag {
			return m[:n:n]
		}
		m = m[n:]
	}
	return nil
}

// frameAt returns the Frame that starts at b[0]; b may go on behind it.
func frameAt(b []byte) Frame {
	n, w := binary.Uvarint(b[1:])
	end := 1 + w + int(n)
	return Frame(b[:end:end])
}
