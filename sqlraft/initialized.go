package sqlraft

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/quire-db/quire/backend"
)

// Initialized returns the id of the member whose log is in dir; 0 where there is none, or none that got as far as knowing
// its member. It changes nothing, so it does not matter who else has the log open.
func Initialized(dir string) (id uint64, err error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	l := &raftLog{d: osDisk{}, dir: dir}
	names, err := l.d.list(dir)
	if err != nil {
		return 0, explainDiskError(dir, err)
	}
	var newest uint64
	for _, name := range names {
		newest = max(newest, parseSegmentName(name))
	}
	if newest == 0 {
		return 0, nil
	}
	// Each segment begins with what those before it have said.
	m, f, err := l.load(newest, nil)
	if err != nil {
		return 0, explainDiskError(dir, err)
	}
	var r replay
	if err := errors.Join(r.segment(m), f.close()); err != nil {
		return 0, err
	}
	if len(r.identity) == 0 {
		return 0, nil
	}
	var identity logIdentity
	if err := json.Unmarshal(r.identity, &identity); err != nil {
		return 0, fmt.Errorf("%w: the identity in the raft log: %w", backend.ErrDamaged, err)
	}
	return identity.Member, nil
}
