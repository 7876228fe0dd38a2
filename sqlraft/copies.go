package sqlraft

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/quire-db/quire/backend"
)

// servedCopies is the copy of the state that other members may fetch. It goes when there is a newer one, or nobody needs it,
// as soon as nobody reads it any more.
type servedCopies struct {
	mu      sync.Mutex
	name    string
	current *servedCopy // nil: there is none
}

type servedCopy struct {
	backend.Snapshot
	readers int
	old     bool // it goes with the last reader
}

func (s *servedCopies) put(name string, c backend.Snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.name, s.current = name, &servedCopy{Snapshot: c}
}

// open returns a copy for one reader, who calls release in the end.
func (s *servedCopies) open(name string) (*servedCopy, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.current
	if c == nil || s.name != name {
		return nil, nil, fmt.Errorf("sqlraft: no copy of the state %q is here", name)
	}
	c.readers++
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		c.readers--
		c.removeUnread()
	}, nil
}

// release lets go of the copy.
func (s *servedCopies) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.current; c != nil {
		s.current = nil
		c.old = true
		c.removeUnread()
	}
}

// removeUnread deletes a copy that nobody needs. What is left of it when that fails, the next start removes.
func (c *servedCopy) removeUnread() {
	if c.old && c.readers == 0 {
		_ = c.Release()
	}
}

// makeSnapshot makes a copy of the state for whoever needs one.
func (n *Node) makeSnapshot() {
	start := time.Now()
	notice, err := n.copyState()
	if n.ctx.Err() != nil {
		return
	}
	if err != nil {
		notice = &snapshotNotice{}
	}
	n.o.Hooks.SnapshotMade(notice.index, notice.Size, time.Since(start), err)
	n.call(func(c *core) { c.snapshotMade(notice, err) })
}

func (n *Node) copyState() (*snapshotNotice, error) {
	s, err := n.sm.Snapshot(n.ctx)
	if err != nil {
		return nil, err
	}
	sum, err := checksumOf(n.ctx, s)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("sqlraft: reading a copy of the state: %w", err), s.Release())
	}
	notice := &snapshotNotice{
		from: n.o.ID, index: s.Index(), term: s.Term(),
		Name: fmt.Sprintf("%016x-%016x", s.Index(), randomNumber()), Size: s.Size(), SHA256: sum, Members: s.Members(),
	}
	n.copies.put(notice.Name, s)
	return notice, nil
}

func checksumOf(ctx context.Context, s backend.Snapshot) ([]byte, error) {
	h := sha256.New()
	r := io.NewSectionReader(s, 0, s.Size())
	for {
		switch _, err := io.CopyN(h, r, 4<<20); {
		case errors.Is(err, io.EOF):
			return h.Sum(nil), nil
		case err != nil:
			return nil, err
		case ctx.Err() != nil:
			return nil, ctx.Err()
		}
	}
}

// download fetches another member's copy.
func (n *Node) download(notice *snapshotNotice) {
	n.o.Hooks.SnapshotBegun(notice.from)
	var err error
	if len(notice.SHA256) != sha256.Size {
		err = fmt.Errorf("sqlraft: member %x announces a copy of the state with a checksum of %d bytes", notice.from, len(notice.SHA256))
	} else {
		err = n.t.fetchSnapshot(n.ctx, notice.from, notice.Name, notice.Size, [sha256.Size]byte(notice.SHA256), n.o.InstallPath,
			func(done, total int64) { n.o.Hooks.SnapshotFetching(notice.from, done, total) })
	}
	if n.ctx.Err() != nil {
		return
	}
	n.o.Hooks.SnapshotFetched(notice.from, notice.index, err)
	n.call(func(c *core) { c.downloaded(n.o.InstallPath, err) })
}
