package backend

import (
	"errors"
	"fmt"
)

// Errors of a request, in the order of etcd's own table (api/v3rpc/rpctypes). etcdapi/errors.go
// turns each into etcd's code and text.
var (
	// ErrFutureRev: the revision asked for is larger than the store's.
	ErrFutureRev = errors.New("backend: required revision is a future revision")
	// ErrCompacted: the revision asked for lies behind the compaction revision. See CompactedError.
	ErrCompacted = errors.New("backend: required revision has been compacted")
	// ErrDuplicateKey: a Txn would write one key twice.
	ErrDuplicateKey = errors.New("backend: duplicate key given in txn request")
	// ErrKeyNotFound: ignore_value or ignore_lease on a key that does not exist.
	ErrKeyNotFound = errors.New("backend: key not found")

	ErrLeaseNotFound    = errors.New("backend: requested lease not found")
	ErrLeaseExists      = errors.New("backend: lease already exists")
	ErrLeaseTTLTooLarge = errors.New("backend: too large lease TTL")

	// ErrNoSpace: the quota is used up and the NOSPACE alarm stands. Deletes and compactions go on.
	ErrNoSpace = errors.New("backend: database space exceeded")
	// ErrCorrupt: the CORRUPT alarm stands.
	ErrCorrupt = errors.New("backend: corrupt")
)

// Errors of auth, in the order of etcd's own table.
var (
	ErrRootUserNotExist     = errors.New("backend: root user does not exist")
	ErrRootRoleNotExist     = errors.New("backend: root user does not have root role")
	ErrUserExists           = errors.New("backend: user already exists")
	ErrUserEmpty            = errors.New("backend: user name is empty")
	ErrUserNotFound         = errors.New("backend: user not found")
	ErrRoleExists           = errors.New("backend: role already exists")
	ErrRoleNotFound         = errors.New("backend: role not found")
	ErrRoleEmpty            = errors.New("backend: role name is empty")
	ErrAuthFailed           = errors.New("backend: authentication failed, invalid user ID or password")
	ErrPermissionNotGiven   = errors.New("backend: permission not given")
	ErrPermissionDenied     = errors.New("backend: permission denied")
	ErrRoleNotGranted       = errors.New("backend: role is not granted to the user")
	ErrPermissionNotGranted = errors.New("backend: permission is not granted to the role")
	ErrAuthNotEnabled       = errors.New("backend: authentication is not enabled")
	ErrInvalidAuthMgmt      = errors.New("backend: invalid auth management")
	ErrAuthOldRevision      = errors.New("backend: revision of auth store is old")
	ErrNoPasswordUser       = errors.New("backend: password was given for no password user")
)

// Errors of the storage.
var (
	// ErrClosed: Close was called.
	ErrClosed = errors.New("backend: the database is closed")
	// ErrStorage: the batch could not be made durable; it was rolled back in memory, but whether it
	// will be found after a crash is not known. It wraps the cause.
	ErrStorage = errors.New("backend: the storage failed")
	// ErrDiskFull: there was no room on the disk; the batch was rolled back.
	ErrDiskFull = errors.New("backend: the disk is full")
	// ErrUnavailable: the database cannot be asked at present; nothing was changed.
	ErrUnavailable = errors.New("backend: the database is not available")
	// ErrHistoryLost: the database does not have revisions any more that this process has served.
	ErrHistoryLost = errors.New("backend: the database has lost revisions that were served from it")
)

// Errors of opening. Each is wrapped with what to do.
var (
	ErrInUse       = errors.New("database is in use by another process")
	ErrNewerSchema = errors.New("database was written by a newer quire")
	ErrDamaged     = errors.New("database file is damaged")
)

// CompactedError is ErrCompacted together with the revision that the store is compacted at, which a
// watch response carries (WatchResponse.compact_revision).
type CompactedError struct{ CompactRevision int64 }

func (e *CompactedError) Error() string {
	return fmt.Sprintf("%v (compacted at revision %d)", ErrCompacted, e.CompactRevision)
}

func (e *CompactedError) Is(target error) bool { return target == ErrCompacted }
