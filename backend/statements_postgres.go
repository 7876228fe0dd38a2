package backend

import (
	"strings"

	"github.com/quire-db/quire/migrations"
)

// pgLockIdle is how long the server leaves the writers' lock to a process that does nothing with it: one that is stopped, or
// cannot be reached. It is less than others wait for the lock (lock_timeout in migrations/postgres).
const pgLockIdle = "3s"

// pgStatements are the statements of the Postgres storage, with the name of the schema in them: a pooler keeps no
// search_path. Where the planner could choose badly for want of statistics, the statement is a function that carries the
// settings against it (migrations/postgres).
type pgStatements struct {
	version int64 // of the schema that this binary knows

	commitBatch, commitAuthBatch                   string
	head, lock, resolve                            string
	commitsFrom, rowsOfCommits                     string
	row, rows, rowsFrom                            string
	lastID, compactRevision, leases, alarms        string
	authMeta, users, grants, roles, permissions    string
	countRows, loadRows, checkRows                 string
	channel, clusterID, clientURLs                 string
	report, leave, claimSweep, finishSweep, delete string
	vacuum                                         string
}

func newPgStatements(schema string) pgStatements {
	name := quoteName(schema)
	in := func(sql string) string { return strings.ReplaceAll(sql, "${schema}", name) }
	const columns = "id, rev, sub, create_rev, version, lease, deleted, author, key, value"
	return pgStatements{
		version: migrations.Latest(migrations.Postgres(name)),
		commitBatch: in(`SELECT seq, token, clock, required_schema FROM ${schema}.commit_batch(
			$1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)`),
		commitAuthBatch: in(`SELECT seq, token, clock, required_schema FROM ${schema}.commit_auth_batch(
			$1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22)`),
		head:    in(`SELECT seq, token, clock FROM ${schema}.head()`),
		lock:    in(`SELECT set_config('idle_in_transaction_session_timeout', '` + pgLockIdle + `', true) FROM ${schema}.lock_commits()`),
		resolve: in(`SELECT ${schema}.resolve_commit($1, $2, $3)`),
		commitsFrom: in(`SELECT seq, token, last_id, committed_at, lease_ids, lease_ttls, lease_deadlines, alarm_members, alarm_kinds, compacted, auth
			FROM ${schema}.commits_from($1, $2)`),
		rowsOfCommits: in(`SELECT ` + columns + ` FROM ${schema}.rows_of_commits($1, $2, $3)`),
		row:           in(`SELECT ` + columns + ` FROM ${schema}.revisions WHERE id = $1`),
		rows:          in(`SELECT ` + columns + ` FROM ${schema}.revisions WHERE id = ANY ($1)`),
		rowsFrom:      in(`SELECT ` + columns + ` FROM ${schema}.rows_from($1, $2, $3)`),
		lastID:        in(`SELECT last_id FROM ${schema}.commits ORDER BY seq DESC LIMIT 1`),
		// The rows are there in the order of their ids after a while only: they have to be sorted.
		loadRows: in(`SELECT id, rev, create_rev, version, lease, deleted, octet_length(value)::bigint, committed_at, key
			FROM ${schema}.revisions ORDER BY id`),
		checkRows: in(`SELECT id, rev, sub::bigint, create_rev, version, lease, deleted, committed_at, octet_length(value)::bigint, key
			FROM ${schema}.revisions ORDER BY id`),
		countRows:       in(`SELECT reltuples::bigint FROM pg_catalog.pg_class WHERE oid = '${schema}.revisions'::regclass`),
		compactRevision: in(`SELECT value FROM ${schema}.meta WHERE name = 'compact_revision'`),
		leases:          in(`SELECT id, ttl, deadline FROM ${schema}.lease ORDER BY id`),
		alarms:          in(`SELECT member, alarm FROM ${schema}.alarm ORDER BY member, alarm`),
		authMeta:        in(`SELECT name, value FROM ${schema}.meta WHERE name IN ('auth_enabled', 'auth_revision') ORDER BY name`),
		users:           in(`SELECT name, password, no_password FROM ${schema}.auth_user ORDER BY name`),
		grants:          in(`SELECT "user", role FROM ${schema}.auth_grant ORDER BY "user", role`),
		roles:           in(`SELECT name FROM ${schema}.auth_role ORDER BY name`),
		permissions:     in(`SELECT role, type, key, range_end FROM ${schema}.auth_permission ORDER BY role, place`),
		clusterID:       in(`SELECT value FROM ${schema}.meta WHERE name = 'cluster_id'`),
		clientURLs:      in(`SELECT DISTINCT unnest(urls) AS url FROM ${schema}.process WHERE seen_at > ${schema}.now_us() - $1 ORDER BY url`),
		channel:         in(`SELECT 'quire_' || '${schema}.commits'::regclass::oid::text`),
		report:          in(`SELECT bytes, clock FROM ${schema}.report($1, $2, $3, $4, $5)`),
		leave:           in(`DELETE FROM ${schema}.process WHERE id = $1`),
		claimSweep:      in(`SELECT ${schema}.claim_sweep($1, $2, $3, $4)`),
		finishSweep:     in(`SELECT FROM ${schema}.finish_sweep($1, $2, $3)`),
		delete:          in(`SELECT FROM ${schema}.delete_rows($1)`),
		vacuum:          in(`VACUUM ${schema}.revisions, ${schema}.commits, ${schema}.lease`),
	}
}

// quoteName writes a name so that Postgres takes it as it is.
func quoteName(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }
