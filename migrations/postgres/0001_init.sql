-- 0001 enables everything that any number of quire processes need in one schema of a Postgres database (15 or newer):
-- revisions, commits, leases, alarms, meta, processes, the functions that they write through, and the views kv, history
-- and leases for people. Every quire can open the data after it. A released file of this folder is never edited: what
-- must change goes into a new file with the next number.
--
-- ${schema} is the quoted name of the schema, put in by package migrations. Every name is written with it, because a
-- pooler in transaction mode keeps no search_path.
--
-- writers: 1
-- The line above says which quire may write after this file: those that know this schema version or a newer one. It is
-- kept in meta (writer_schema), and commit_batch refuses others, so that old and new processes never write side by side
-- unless the file says that they may.
--
-- The names below are a public API, people and their scripts use them. Read as much as you like while quire runs
-- (readers never block it). Do not write: quire answers from memory and would neither see nor announce your change.

-- +goose Up

CREATE TABLE ${schema}.revisions (
    id           bigint  NOT NULL PRIMARY KEY,
    rev          bigint  NOT NULL,
    sub          integer NOT NULL,
    create_rev   bigint  NOT NULL,
    version      bigint  NOT NULL,
    lease        bigint  NOT NULL,
    deleted      boolean NOT NULL,
    committed_at bigint  NOT NULL,
    author       text    NOT NULL,
    key          bytea   NOT NULL,
    value        bytea   NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0,
        autovacuum_vacuum_insert_scale_factor = 0.2, autovacuum_analyze_scale_factor = 0.1);
COMMENT ON TABLE ${schema}.revisions IS 'One row for each key changed by a revision: the truth, everything else is derived from it. Appended in revision order and never updated. Compaction deletes rows that no reader can see any more. There is no index on key or rev on purpose: the servers keep that index in memory.';
COMMENT ON COLUMN ${schema}.revisions.id IS 'position in the log, dense, in the order of (rev, sub); deleted rows leave holes';
COMMENT ON COLUMN ${schema}.revisions.rev IS 'the revision that made this row (mod_revision)';
COMMENT ON COLUMN ${schema}.revisions.sub IS 'place of the row inside its revision, from 0';
COMMENT ON COLUMN ${schema}.revisions.create_rev IS 'create_revision of the key, 0 in a tombstone';
COMMENT ON COLUMN ${schema}.revisions.version IS 'version of the key, 0 in a tombstone';
COMMENT ON COLUMN ${schema}.revisions.lease IS 'id of the attached lease, 0 if none';
COMMENT ON COLUMN ${schema}.revisions.deleted IS 'this row is a tombstone: the key was deleted';
COMMENT ON COLUMN ${schema}.revisions.committed_at IS 'microseconds since 1970, UTC, by the clock of the database';
COMMENT ON COLUMN ${schema}.revisions.author IS 'who asked: auth user, else client certificate CN, else empty';
COMMENT ON COLUMN ${schema}.revisions.value IS 'any bytes, empty in a tombstone';

-- Compressing with lz4 costs a third of what pglz costs; a server built without it keeps its default.
-- +goose StatementBegin
DO $$
BEGIN
    ALTER TABLE ${schema}.revisions ALTER COLUMN value SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;
-- +goose StatementEnd

CREATE TABLE ${schema}.commits (
    seq             bigint  NOT NULL PRIMARY KEY,
    token           uuid    NOT NULL,
    last_id         bigint  NOT NULL,
    committed_at    bigint  NOT NULL,
    lease_ids       bigint[],
    lease_ttls      bigint[],
    lease_deadlines bigint[],
    alarm_members   bigint[],
    alarm_kinds     integer[],
    compacted       bigint
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0,
        autovacuum_vacuum_insert_scale_factor = 0.2);
COMMENT ON TABLE ${schema}.commits IS 'One row for each batch of writes, in their order: what a quire process reads to learn what the others have done, and how it finds out whether a commit whose answer was lost took place. The newest row always stays; older ones go when every process has seen them.';
COMMENT ON COLUMN ${schema}.commits.seq IS 'number of the batch, without gaps';
COMMENT ON COLUMN ${schema}.commits.token IS 'random, drawn by the process that wrote the batch';
COMMENT ON COLUMN ${schema}.commits.last_id IS 'the newest row of revisions after the batch';
COMMENT ON COLUMN ${schema}.commits.lease_ids IS 'leases that the batch changed; with TTL 0 those that it removed. NULL: none';
COMMENT ON COLUMN ${schema}.commits.alarm_members IS 'all alarms after the batch, if it changed them; else NULL';
COMMENT ON COLUMN ${schema}.commits.compacted IS 'the compaction revision, if the batch moved it; else NULL';

CREATE TABLE ${schema}.lease (
    id       bigint NOT NULL PRIMARY KEY,
    ttl      bigint NOT NULL,
    deadline bigint NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);
COMMENT ON TABLE ${schema}.lease IS 'Leases in force. The view leases shows them for people.';
COMMENT ON COLUMN ${schema}.lease.ttl IS 'granted time to live in seconds';
COMMENT ON COLUMN ${schema}.lease.deadline IS 'when it expires unless kept alive, microseconds since 1970, UTC, by the clock of the database';

CREATE TABLE ${schema}.alarm (
    member bigint  NOT NULL,
    alarm  integer NOT NULL,
    PRIMARY KEY (member, alarm)
);
COMMENT ON TABLE ${schema}.alarm IS 'Alarms raised (etcd''s AlarmMember): 1 NOSPACE, 2 CORRUPT.';

CREATE TABLE ${schema}.meta (
    name  text   NOT NULL PRIMARY KEY,
    value bigint NOT NULL
);
COMMENT ON TABLE ${schema}.meta IS 'Single facts: compact_revision (missing: never compacted), cluster_id (random, what all processes call this store), writer_schema (the oldest schema version that a writer must know), swept_revision (no row is left that a compaction up to there made unreachable), sweep_revision (such rows are being deleted up to there).';

CREATE TABLE ${schema}.process (
    id         uuid   NOT NULL PRIMARY KEY,
    name       text   NOT NULL,
    urls       text[] NOT NULL,
    started_at bigint NOT NULL,
    seen_at    bigint NOT NULL,
    seq        bigint NOT NULL,
    released   bigint NOT NULL,
    sweeping   bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 50);
COMMENT ON TABLE ${schema}.process IS 'The quire processes that serve this schema, or did not long ago: a row that any of them may still need is not deleted.';
COMMENT ON COLUMN ${schema}.process.urls IS 'where it serves clients (--advertise-client-urls)';
COMMENT ON COLUMN ${schema}.process.seen_at IS 'when it last reported here, microseconds since 1970, UTC, by the clock of the database';
COMMENT ON COLUMN ${schema}.process.seq IS 'the batch up to which it has read commits';
COMMENT ON COLUMN ${schema}.process.released IS 'the compaction revision before which nobody reads through it any more';
COMMENT ON COLUMN ${schema}.process.sweeping IS 'until when it alone deletes compacted rows, microseconds since 1970, UTC; 0: it does not';

INSERT INTO ${schema}.meta (name, value)
VALUES ('writer_schema', 1), ('cluster_id', 1 + (random() * 9007199254740991)::bigint);
INSERT INTO ${schema}.commits (seq, token, last_id, committed_at)
VALUES (1, gen_random_uuid(), 0, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint);

-- +goose StatementBegin
CREATE FUNCTION ${schema}.now_us() RETURNS bigint LANGUAGE sql VOLATILE AS
$$ SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint $$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.now_us() IS 'The clock of the database, microseconds since 1970, UTC.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.lock_commits() RETURNS void LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' AS
$$
BEGIN
    -- 0x71756972 ("quir") and the table's oid: a lock for this schema alone.
    PERFORM pg_advisory_xact_lock((1903520114::bigint << 32) | '${schema}.commits'::regclass::oid::bigint);
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.lock_commits() IS 'Makes writers queue until the transaction ends, so that the second does not run into the first. That only one of two can follow the same batch is guaranteed by the primary key of commits, not by this lock.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.head(OUT seq bigint, OUT token uuid, OUT clock bigint) LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' SET jit = off SET plan_cache_mode = 'force_generic_plan' SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off AS
$$
BEGIN
    SELECT c.seq, c.token INTO STRICT seq, token FROM ${schema}.commits AS c ORDER BY c.seq DESC LIMIT 1;
    clock := ${schema}.now_us();
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.head() IS 'The newest batch, and the clock of the database.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.commit_batch(
    expected_seq bigint, expected_token uuid, new_token uuid, writer_schema bigint, written_at bigint,
    ids bigint[], revs bigint[], subs bigint[], creates bigint[], versions bigint[], row_leases bigint[],
    deletes bigint[], authors text[], keys bytea[], vals bytea[],
    changed_leases bigint[], changed_ttls bigint[], changed_deadlines bigint[],
    all_alarm_members bigint[], all_alarm_kinds bigint[], compact bigint,
    OUT seq bigint, OUT token uuid, OUT clock bigint, OUT required_schema bigint
) LANGUAGE plpgsql VOLATILE
    SET jit = off SET plan_cache_mode = 'force_generic_plan' SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off
    SET lock_timeout = '4s' AS
$$
DECLARE
    last bigint;
BEGIN
    PERFORM ${schema}.lock_commits();
    SELECT c.seq, c.token, c.last_id INTO STRICT seq, token, last FROM ${schema}.commits AS c ORDER BY c.seq DESC LIMIT 1;
    SELECT m.value INTO STRICT required_schema FROM ${schema}.meta AS m WHERE m.name = 'writer_schema';
    clock := ${schema}.now_us();
    IF seq <> expected_seq OR token <> expected_token OR required_schema > commit_batch.writer_schema THEN
        RETURN;
    END IF;
    -- What is acknowledged must survive a crash, whatever the role or the database have as their default.
    -- Not a SET of this function: that would end with it, before the commit.
    IF current_setting('synchronous_commit') IN ('off', 'local') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    IF cardinality(ids) > 0 THEN
        INSERT INTO ${schema}.revisions (id, rev, sub, create_rev, version, lease, deleted, committed_at, author, key, value)
        SELECT r.id, r.rev, r.sub, r.create_rev, r.version, r.lease, r.deleted <> 0, written_at, r.author, r.key, r.value
          FROM unnest(ids, revs, subs, creates, versions, row_leases, deletes, authors, keys, vals)
               AS r (id, rev, sub, create_rev, version, lease, deleted, author, key, value);
        last := ids[cardinality(ids)];
    END IF;
    IF changed_leases IS NOT NULL THEN
        DELETE FROM ${schema}.lease AS l USING unnest(changed_leases, changed_ttls) AS c (id, ttl)
         WHERE l.id = c.id AND c.ttl = 0;
        INSERT INTO ${schema}.lease AS l (id, ttl, deadline)
        SELECT c.id, c.ttl, c.deadline FROM unnest(changed_leases, changed_ttls, changed_deadlines) AS c (id, ttl, deadline)
         WHERE c.ttl <> 0
            ON CONFLICT (id) DO UPDATE SET ttl = excluded.ttl, deadline = excluded.deadline;
    END IF;
    IF all_alarm_members IS NOT NULL THEN
        DELETE FROM ${schema}.alarm;
        INSERT INTO ${schema}.alarm (member, alarm) SELECT * FROM unnest(all_alarm_members, all_alarm_kinds);
    END IF;
    IF compact IS NOT NULL THEN
        INSERT INTO ${schema}.meta AS m (name, value) VALUES ('compact_revision', compact)
            ON CONFLICT (name) DO UPDATE SET value = excluded.value;
    END IF;
    INSERT INTO ${schema}.commits (seq, token, last_id, committed_at, lease_ids, lease_ttls, lease_deadlines,
                                   alarm_members, alarm_kinds, compacted)
    VALUES (expected_seq + 1, new_token, last, written_at, changed_leases, changed_ttls, changed_deadlines,
            all_alarm_members, all_alarm_kinds, compact);
    seq := expected_seq + 1;
    token := new_token;
    PERFORM pg_notify('quire_' || '${schema}.commits'::regclass::oid::text, seq::text);
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.commit_batch IS 'Appends a batch behind the one expected and returns the newest, which is another one if some process was faster or writer_schema is too old; then nothing was changed.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.resolve_commit(after_seq bigint, wanted uuid, fence uuid, OUT committed boolean) LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' AS
$$
BEGIN
    -- (No variable may be called found: that is one of PL/pgSQL's own.)
    PERFORM ${schema}.lock_commits();
    IF NOT EXISTS (SELECT FROM ${schema}.commits AS c WHERE c.seq = after_seq OR c.seq = after_seq + 1 AND c.token = wanted) THEN
        RETURN;
    END IF;
    IF current_setting('synchronous_commit') IN ('off', 'local') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    -- An empty batch. If the wanted one is not there, it cannot come any more, because something else has followed the
    -- batch before it. If it is there, it is as safe as this one when this one is: on a synchronous standby too.
    INSERT INTO ${schema}.commits (seq, token, last_id, committed_at)
    SELECT c.seq + 1, fence, c.last_id, c.committed_at FROM ${schema}.commits AS c ORDER BY c.seq DESC LIMIT 1;
    -- Not before: where the lock is ignored, the wanted batch may have come until then.
    committed := EXISTS (SELECT FROM ${schema}.commits AS c WHERE c.seq = after_seq + 1 AND c.token = wanted);
    PERFORM pg_notify('quire_' || '${schema}.commits'::regclass::oid::text, '');
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.resolve_commit IS 'Says whether the batch with a token followed another, and makes the answer final; NULL if it cannot be told any more, because both are deleted or lost.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.commits_from(first bigint, most bigint) RETURNS SETOF ${schema}.commits LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' SET jit = off SET plan_cache_mode = 'force_generic_plan' SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off AS
$$
BEGIN
    RETURN QUERY SELECT * FROM ${schema}.commits AS c WHERE c.seq >= first ORDER BY c.seq LIMIT most;
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.commits_from(bigint, bigint) IS 'Batches from one on, in order.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.rows_of_commits(first bigint, most bigint, after_id bigint) RETURNS SETOF ${schema}.revisions LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' SET jit = off SET plan_cache_mode = 'force_generic_plan' SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off AS
$$
DECLARE
    last bigint;
BEGIN
    SELECT max(n.last_id) INTO last
      FROM (SELECT c.last_id FROM ${schema}.commits AS c WHERE c.seq >= first ORDER BY c.seq LIMIT most) AS n;
    RETURN QUERY SELECT * FROM ${schema}.revisions AS r WHERE r.id > after_id AND r.id <= last ORDER BY r.id;
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.rows_of_commits(bigint, bigint, bigint) IS 'The rows after one that the batches of commits_from(first, most) made, in order.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.rows_from(first bigint, most bigint, from_rev bigint) RETURNS SETOF ${schema}.revisions LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' SET jit = off SET plan_cache_mode = 'force_generic_plan' SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off AS
$$
DECLARE
    swept bigint;
BEGIN
    RETURN QUERY SELECT * FROM ${schema}.revisions AS r WHERE r.id >= first ORDER BY r.id LIMIT most;
    -- After the rows: whatever is missing among them was announced before it was deleted.
    SELECT m.value INTO swept FROM ${schema}.meta AS m WHERE m.name = 'sweep_revision' AND m.value > from_rev;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'QU001', MESSAGE = swept::text;
    END IF;
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.rows_from(bigint, bigint, bigint) IS 'Rows from one on, in order, of which those of from_rev and later are wanted. An error with SQLSTATE QU001 and the compaction revision says that some of them may be deleted: then the caller was away for long.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.delete_rows(ids bigint[]) RETURNS void LANGUAGE plpgsql VOLATILE
    SET jit = off SET plan_cache_mode = 'force_generic_plan' SET enable_seqscan = off
    SET lock_timeout = '4s' AS
$$
BEGIN
    DELETE FROM ${schema}.revisions AS r WHERE r.id = ANY (ids);
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.delete_rows(bigint[]) IS 'Deletes compacted rows.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.report(me uuid, my_name text, my_urls text[], my_seq bigint, my_released bigint,
                                 OUT bytes bigint, OUT clock bigint) LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' AS
$$
BEGIN
    clock := ${schema}.now_us();
    INSERT INTO ${schema}.process AS p (id, name, urls, started_at, seen_at, seq, released)
    VALUES (me, my_name, my_urls, clock, clock, my_seq, my_released)
        ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at, seq = excluded.seq, released = excluded.released;
    bytes := pg_total_relation_size('${schema}.revisions') + pg_total_relation_size('${schema}.commits')
           + pg_total_relation_size('${schema}.lease');
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.report(uuid, text, text[], bigint, bigint) IS 'A process says that it lives and how far it is; the size of the store.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.claim_sweep(me uuid, target bigint, silent_us bigint, claim_us bigint) RETURNS bigint LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' AS
$$
DECLARE
    clock bigint;
    swept bigint;
BEGIN
    INSERT INTO ${schema}.meta (name, value) VALUES ('swept_revision', -1) ON CONFLICT (name) DO NOTHING;
    -- One at a time.
    SELECT m.value INTO STRICT swept FROM ${schema}.meta AS m WHERE m.name = 'swept_revision' FOR UPDATE;
    clock := ${schema}.now_us();
    IF swept >= target THEN
        RETURN 0;
    END IF;
    IF EXISTS (SELECT FROM ${schema}.process AS p WHERE p.id <> me AND p.sweeping > clock) THEN
        RETURN 1;
    END IF;
    IF EXISTS (SELECT FROM ${schema}.process AS p WHERE p.seen_at > clock - silent_us AND p.released < target) THEN
        RETURN 2;
    END IF;
    UPDATE ${schema}.process AS p SET sweeping = clock + claim_us WHERE p.id = me;
    INSERT INTO ${schema}.meta AS m (name, value) VALUES ('sweep_revision', target)
        ON CONFLICT (name) DO UPDATE SET value = greatest(m.value, excluded.value);
    RETURN 3;
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.claim_sweep(uuid, bigint, bigint, bigint) IS 'Whether a process may delete what the compaction at target made unreachable: 0 it is deleted, 1 another process is at it, 2 some process that was seen in the last silent_us may still read it, 3 yes, for claim_us.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.finish_sweep(me uuid, target bigint, silent_us bigint) RETURNS void LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' AS
$$
DECLARE
    clock bigint := ${schema}.now_us();
    needed bigint;
BEGIN
    UPDATE ${schema}.meta AS m SET value = greatest(m.value, target) WHERE m.name = 'swept_revision';
    UPDATE ${schema}.process AS p SET sweeping = 0 WHERE p.id = me;
    DELETE FROM ${schema}.process AS p WHERE p.seen_at < clock - silent_us;
    -- Batches that every process has read, but for the newest: a process compares its token.
    SELECT min(p.seq) INTO needed FROM ${schema}.process AS p;
    DELETE FROM ${schema}.commits AS c
     WHERE c.seq < least(needed, (SELECT max(l.seq) FROM ${schema}.commits AS l)) AND c.committed_at < clock - silent_us;
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.finish_sweep(uuid, bigint, bigint) IS 'Notes that what the compaction at target made unreachable is deleted, and deletes batches and processes that are history.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.readable(bytes bytea) RETURNS text LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS
$$
DECLARE
    t text;
BEGIN
    t := convert_from(bytes, 'UTF8');
    IF t ~ '[\x01-\x1f\x7f-\x9f]' OR starts_with(t, '\x') THEN
        RETURN bytes::text;
    END IF;
    RETURN t;
EXCEPTION WHEN OTHERS THEN
    RETURN bytes::text;
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.readable(bytea) IS 'Bytes as text. What is not readable text (invalid UTF-8, control characters, NUL too, or text that starts with \x itself) is shown as \x and hexadecimal digits, which can be pasted into a query as bytea. So equal text always means equal bytes.';

CREATE VIEW ${schema}.kv AS
SELECT ${schema}.readable(r.key) AS key,
       r.rev AS revision,
       r.create_rev AS create_revision,
       r.version,
       CASE WHEN r.lease <> 0 THEN lpad(to_hex(r.lease), 16, '0') END AS lease,
       octet_length(r.value) AS size,
       to_timestamp(r.committed_at / 1000000.0) AS modified_at,
       r.author,
       r.value
  FROM ${schema}.revisions AS r
 WHERE r.id IN (SELECT max(id) FROM ${schema}.revisions GROUP BY key)
   AND NOT r.deleted;
COMMENT ON VIEW ${schema}.kv IS 'What is there now, one row per live key. No index on key exists, so this reads all of revisions once. key: see the function readable; lease: in hexadecimal as etcdctl prints it; size: of the value, in bytes; value: the bytes as they were put.';

CREATE VIEW ${schema}.history AS
SELECT r.rev AS revision,
       r.sub,
       CASE WHEN r.deleted THEN 'delete' ELSE 'put' END AS op,
       ${schema}.readable(r.key) AS key,
       r.create_rev AS create_revision,
       r.version,
       CASE WHEN r.lease <> 0 THEN lpad(to_hex(r.lease), 16, '0') END AS lease,
       octet_length(r.value) AS size,
       to_timestamp(r.committed_at / 1000000.0) AS at,
       r.author,
       r.value
  FROM ${schema}.revisions AS r
 ORDER BY r.id;
COMMENT ON VIEW ${schema}.history IS 'Every change not yet compacted, oldest first. Columns as in kv, and sub: place of the row inside its revision; op: put or delete (a delete has create_revision = version = size = 0); at: when it was committed.';

CREATE VIEW ${schema}.leases AS
SELECT lpad(to_hex(l.id), 16, '0') AS id,
       l.ttl AS granted_ttl,
       to_timestamp(l.deadline / 1000000.0) AS deadline,
       greatest(0, (l.deadline - ${schema}.now_us()) / 1000000) AS remaining,
       coalesce(a.keys, 0) AS keys
  FROM ${schema}.lease AS l
  LEFT JOIN (SELECT r.lease, count(*) AS keys
               FROM ${schema}.revisions AS r
              WHERE r.id IN (SELECT max(id) FROM ${schema}.revisions GROUP BY key)
                AND NOT r.deleted AND r.lease <> 0
              GROUP BY r.lease) AS a ON a.lease = l.id
 ORDER BY l.deadline, l.id;
COMMENT ON VIEW ${schema}.leases IS 'Leases in force, and what hangs on them: granted_ttl and remaining in seconds, keys: how many live keys are attached.';
