package backend

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"
)

// This is the skin over pgconn, the lower half of pgx: parameters and results in Postgres's binary form, written and read
// in place. A statement is parsed, bound and run in one round trip; those that run often are prepared (postgres_lane.go).

// Types of parameters (catalog pg_type).
const (
	oidInt8       = 20
	oidText       = 25
	oidUUID       = 2950
	oidBytea      = 17
	oidInt8Array  = 1016
	oidTextArray  = 1009
	oidByteaArray = 1001
)

// pgToken is a random UUID: it tells one batch from every other.
type pgToken [16]byte

func (t pgToken) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", t[0:4], t[4:6], t[6:8], t[8:10], t[10:16])
}

// pgArgs are the parameters of one statement, in order. The zero value has none.
type pgArgs struct {
	values  [][]byte
	oids    []uint32
	formats []int16
}

func (a *pgArgs) add(oid uint32, value []byte) *pgArgs {
	a.values = append(a.values, value)
	a.oids = append(a.oids, oid)
	a.formats = append(a.formats, 1)
	return a
}

func (a *pgArgs) int8(v int64) *pgArgs {
	return a.add(oidInt8, binary.BigEndian.AppendUint64(nil, uint64(v)))
}

// int8OrNull passes NULL where there is nothing.
func (a *pgArgs) int8OrNull(v int64, there bool) *pgArgs {
	if !there {
		return a.add(oidInt8, nil)
	}
	return a.int8(v)
}

func (a *pgArgs) uuid(v pgToken) *pgArgs { return a.add(oidUUID, v[:]) }
func (a *pgArgs) text(v string) *pgArgs  { return a.add(oidText, []byte(v)) }

// int8s passes an array of n numbers; int8sOrNull passes NULL where there is nothing.
func (a *pgArgs) int8s(n int, at func(i int) int64) *pgArgs {
	b := arrayHeader(oidInt8, n, 12*n)
	for i := range n {
		b = binary.BigEndian.AppendUint32(b, 8)
		b = binary.BigEndian.AppendUint64(b, uint64(at(i)))
	}
	return a.add(oidInt8Array, b)
}

func (a *pgArgs) int8sOrNull(there bool, n int, at func(i int) int64) *pgArgs {
	if !there {
		return a.add(oidInt8Array, nil)
	}
	return a.int8s(n, at)
}

func (a *pgArgs) byteas(n int, at func(i int) []byte) *pgArgs {
	size := 0
	for i := range n {
		size += 4 + len(at(i))
	}
	b := arrayHeader(oidBytea, n, size)
	for i := range n {
		v := at(i)
		b = binary.BigEndian.AppendUint32(b, uint32(len(v)))
		b = append(b, v...)
	}
	return a.add(oidByteaArray, b)
}

func (a *pgArgs) texts(n int, at func(i int) string) *pgArgs {
	b := arrayHeader(oidText, n, 8*n)
	for i := range n {
		v := at(i)
		b = binary.BigEndian.AppendUint32(b, uint32(len(v)))
		b = append(b, v...)
	}
	return a.add(oidTextArray, b)
}

// arrayHeader begins an array of one dimension (src/backend/utils/adt/arrayfuncs.c, array_recv): the number of dimensions,
// whether there are NULLs, the type, the length, the first index.
func arrayHeader(oid uint32, n, size int) []byte {
	b := make([]byte, 0, 20+size)
	if n == 0 {
		b = binary.BigEndian.AppendUint32(b, 0)
		b = binary.BigEndian.AppendUint32(b, 0)
		return binary.BigEndian.AppendUint32(b, oid)
	}
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint32(b, oid)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	return binary.BigEndian.AppendUint32(b, 1)
}

// pgRow is a row of a result; its bytes are valid until the next one.
type pgRow [][]byte

// int8 reads a bigint, integer or boolean; NULL is 0.
func (r pgRow) int8(i int) int64 {
	switch v := r[i]; len(v) {
	case 8:
		return int64(binary.BigEndian.Uint64(v))
	case 4:
		return int64(int32(binary.BigEndian.Uint32(v)))
	case 1:
		return int64(v[0])
	default:
		return 0
	}
}

func (r pgRow) bool(i int) bool { return r.int8(i) != 0 }
func (r pgRow) null(i int) bool { return r[i] == nil }
func (r pgRow) text(i int) string {
	return string(r[i])
}

func (r pgRow) uuid(i int) (t pgToken) {
	copy(t[:], r[i])
	return t
}

// int8s reads an array of bigint or integer; NULL is none.
func (r pgRow) int8s(i int) []int64 {
	b := r[i]
	if len(b) < 20 {
		return nil
	}
	n := binary.BigEndian.Uint32(b[12:])
	all := make([]int64, 0, n)
	for b = b[20:]; len(all) < int(n); {
		size := int(binary.BigEndian.Uint32(b))
		all = append(all, pgRow{b[4 : 4+size]}.int8(0))
		b = b[4+size:]
	}
	return all
}

var binaryResults = []int16{1}

// pgQuery runs a statement and calls each, which may be nil, for every row of its result.
func pgQuery(ctx context.Context, c *pgconn.PgConn, sql string, args *pgArgs, each func(pgRow) error) error {
	return pgRead(c.ExecParams(ctx, sql, args.values, args.oids, args.formats, binaryResults), each)
}

// pgRead reads a result to its end: a connection is of no use before that. The first error is returned.
func pgRead(r *pgconn.ResultReader, each func(pgRow) error) (err error) {
	for r.NextRow() {
		if each != nil && err == nil {
			err = each(r.Values())
		}
	}
	if _, cerr := r.Close(); cerr != nil {
		return cerr
	}
	return err
}
