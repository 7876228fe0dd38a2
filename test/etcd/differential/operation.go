package differential

import (
	"fmt"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

type kind string

const (
	opPut         kind = "Put"
	opRange       kind = "Range"
	opRangeStream kind = "RangeStream"
	opDelete      kind = "DeleteRange"
	opTxn         kind = "Txn"
	opCompact     kind = "Compact"
	opGrant       kind = "LeaseGrant"
	opRevoke      kind = "LeaseRevoke"
	opKeepAlive   kind = "LeaseKeepAlive"
	opTimeToLive  kind = "LeaseTimeToLive"
	opLeases      kind = "LeaseLeases"
	opWatch       kind = "Watch create"
	opCancel      kind = "Watch cancel"
	opProgress    kind = "Watch progress"
	opClose       kind = "Watch close"
	opHashKV      kind = "HashKV"
)

// operation is one step. Watch steps name the stream they go to; the number says nothing to the servers.
type operation struct {
	kind    kind
	request proto.Message // nil for opClose
	stream  int
}

func (o operation) String() string {
	text := string(o.kind)
	switch o.kind {
	case opWatch, opCancel, opProgress, opClose:
		text += fmt.Sprintf(" on stream %d", o.stream)
	}
	if o.request != nil {
		text += " {" + prototext.MarshalOptions{}.Format(o.request) + "}"
	}
	return text
}

// revisionFields hold store revisions, which all move when a sequence is played on a store that starts
// at another revision. Zero and negative values mean something of their own.
var revisionFields = map[protoreflect.Name]bool{
	"revision": true, "start_revision": true,
	"min_mod_revision": true, "max_mod_revision": true, "min_create_revision": true, "max_create_revision": true,
	"mod_revision": true, "create_revision": true,
}

// shifted is a copy of o for a store whose base revision is larger by delta.
func (o operation) shifted(delta int64) operation {
	if o.request == nil || delta == 0 {
		return o
	}
	m := proto.Clone(o.request)
	shiftRevisions(m.ProtoReflect(), delta)
	o.request = m
	return o
}

func shiftRevisions(m protoreflect.Message, delta int64) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsList() && f.Kind() == protoreflect.MessageKind:
			for i := range v.List().Len() {
				shiftRevisions(v.List().Get(i).Message(), delta)
			}
		case f.Kind() == protoreflect.MessageKind:
			shiftRevisions(v.Message(), delta)
		case f.Kind() == protoreflect.Int64Kind && revisionFields[f.Name()] && v.Int() > 0:
			m.Set(f, protoreflect.ValueOfInt64(max(v.Int()+delta, 1)))
		}
		return true
	})
}
