package backend

// The statements of the SQLite storage. Each has a name, and each ordered result its ORDER BY.
const (
	sqliteBegin    = `BEGIN IMMEDIATE`
	sqliteCommit   = `COMMIT`
	sqliteRollback = `ROLLBACK`

	sqliteInsertRow = `INSERT INTO revisions
		(id, rev, sub, create_rev, version, lease, deleted, committed_at, author, key, value)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	sqliteDeleteRow = `DELETE FROM revisions WHERE id = ?`
	sqliteLastRow   = `SELECT coalesce(max(id), 0) FROM revisions`
	sqliteRow       = `SELECT rev, create_rev, version, lease, deleted, key, value FROM revisions WHERE id = ?`
	sqliteCountRows = `SELECT count(*) FROM revisions`

	// sqliteLoadRows reads what the index needs. It must not name value but inside length(), which
	// SQLite answers from the row's header.
	sqliteLoadRows = `SELECT id, rev, create_rev, version, lease, deleted, length(value), committed_at, key
		FROM revisions ORDER BY id`
	// sqliteRowsFrom reads values too, row by row as the caller steps.
	sqliteRowsFrom = `SELECT rev, create_rev, version, lease, deleted, key, value, id, sub
		FROM revisions WHERE id >= ? ORDER BY id`
	sqliteCheckRows = `SELECT id, rev, sub, create_rev, version, lease, deleted, committed_at, length(value), key,
		typeof(key), typeof(value)
		FROM revisions ORDER BY id`

	// What a defragmentation takes out of the table, to put it back in the same transaction.
	sqliteTakenTable = `CREATE TEMP TABLE IF NOT EXISTS taken AS SELECT * FROM main.revisions LIMIT 0`
	sqliteRowSizes   = `SELECT id, length(key) + length(value) FROM main.revisions WHERE id > ? ORDER BY id`
	sqliteTakeRows   = `INSERT INTO temp.taken SELECT * FROM main.revisions WHERE id > ? AND id <= ? ORDER BY id`
	sqliteDeleteRows = `DELETE FROM main.revisions WHERE id > ? AND id <= ?`
	sqlitePutRows    = `INSERT INTO main.revisions SELECT * FROM temp.taken ORDER BY id`
	sqliteClearTaken = `DELETE FROM temp.taken`

	sqlitePutLease = `INSERT INTO lease (id, ttl, deadline) VALUES (?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET ttl = excluded.ttl, deadline = excluded.deadline`
	sqliteDeleteLease = `DELETE FROM lease WHERE id = ?`
	sqliteLeases      = `SELECT id, ttl, deadline FROM lease ORDER BY id`

	sqliteClearAlarms = `DELETE FROM alarm`
	sqlitePutAlarm    = `INSERT INTO alarm (member, alarm) VALUES (?, ?)`
	sqliteAlarms      = `SELECT member, alarm FROM alarm ORDER BY member, alarm`

	sqlitePutUser          = `INSERT INTO auth_user (name, password, no_password) VALUES (?, ?, ?)`
	sqliteDeleteUser       = `DELETE FROM auth_user WHERE name = ?`
	sqliteUsers            = `SELECT name, password, no_password FROM auth_user ORDER BY name`
	sqlitePutGrant         = `INSERT INTO auth_grant (user, role) VALUES (?, ?)`
	sqliteDeleteGrants     = `DELETE FROM auth_grant WHERE user = ?`
	sqliteGrants           = `SELECT user, role FROM auth_grant ORDER BY user, role`
	sqlitePutRole          = `INSERT INTO auth_role (name) VALUES (?)`
	sqliteDeleteRole       = `DELETE FROM auth_role WHERE name = ?`
	sqliteRoles            = `SELECT name FROM auth_role ORDER BY name`
	sqlitePutPermission    = `INSERT INTO auth_permission (role, place, type, key, range_end) VALUES (?, ?, ?, ?, ?)`
	sqliteDeletePermission = `DELETE FROM auth_permission WHERE role = ?`
	sqlitePermissions      = `SELECT role, type, key, range_end FROM auth_permission ORDER BY role, place`

	sqlitePutMeta = `INSERT INTO meta (name, value) VALUES (?, ?)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`
	sqliteMeta = `SELECT name, value FROM meta ORDER BY name`

	sqlitePutPosition = `INSERT INTO raft (only, applied, term, clock, clock_term, cluster) VALUES (1, ?, ?, ?, ?, ?)
		ON CONFLICT (only) DO UPDATE SET applied = excluded.applied, term = excluded.term, clock = excluded.clock,
		clock_term = excluded.clock_term, cluster = excluded.cluster`
	sqlitePosition     = `SELECT applied, term, clock, clock_term, cluster FROM raft ORDER BY only`
	sqliteClearMembers = `DELETE FROM member`
	sqlitePutMember    = `INSERT INTO member (id, removed, learner, name, peer_urls, client_urls) VALUES (?, ?, ?, ?, ?, ?)`
	sqliteMembers      = `SELECT id, removed, learner, name, peer_urls, client_urls FROM member ORDER BY id`
)

// Names in the meta table.
const (
	metaCompactRevision = "compact_revision"
	metaOtherChanges    = "other_changes"
	metaAuthEnabled     = "auth_enabled"
	metaAuthRevision    = "auth_revision"
)
