-- 0001 enables everything a single quire needs in one SQLite file: revisions, leases, alarms, meta, and the views kv,
-- history and leases for people. Every quire can open the data after it. The views are tested with the built-in SQLite
-- and with the sqlite3 shell, 3.40 and newer. A released file of this folder is never edited: what must change goes into
-- a new file with the next number.
--
-- The names below are a public API, people and their scripts use them. Read as much as you like while quire runs
-- (readers never block it). Do not write: quire answers from memory and would neither see nor announce your change.
--
-- Comments stand inside the statements so that `.schema` in the sqlite3 shell shows them.

-- +goose Up

CREATE TABLE revisions (
    -- One row for each key changed by a revision: the truth, everything else is derived from it. Appended in revision
    -- order and never updated. Compaction deletes rows that no reader can see any more. Value comes last so that the
    -- narrow columns can be scanned without reading long values. There is no index on key or rev on purpose: it costs
    -- four times the write throughput and five times the bytes, and the server keeps that index in memory.
    id           INTEGER PRIMARY KEY, -- position in the log, dense, in the order of (rev, sub), deleted rows leave holes
    rev          INTEGER NOT NULL,    -- the revision that made this row (mod_revision)
    sub          INTEGER NOT NULL,    -- place of the row inside its revision, from 0
    create_rev   INTEGER NOT NULL,    -- create_revision of the key, 0 in a tombstone
    version      INTEGER NOT NULL,    -- version of the key, 0 in a tombstone
    lease        INTEGER NOT NULL,    -- id of the attached lease, 0 if none
    deleted      INTEGER NOT NULL,    -- 1: this row is a tombstone, the key was deleted
    committed_at INTEGER NOT NULL,    -- microseconds since 1970, UTC
    author       TEXT    NOT NULL,    -- who asked: auth user, else client certificate CN, else empty
    key          BLOB    NOT NULL,    -- any bytes, compared as bytes
    value        BLOB    NOT NULL     -- any bytes, empty in a tombstone
);

CREATE TABLE lease (
    -- Leases in force. The view leases shows them for people.
    id       INTEGER PRIMARY KEY, -- the lease id
    ttl      INTEGER NOT NULL,    -- granted time to live in seconds
    deadline INTEGER NOT NULL     -- when it expires unless kept alive, microseconds since 1970, UTC
);

CREATE TABLE alarm (
    -- Alarms raised (etcd's AlarmMember).
    member INTEGER NOT NULL, -- member id, a 64-bit pattern: ids above 2^63 show as negative numbers
    alarm  INTEGER NOT NULL, -- 1 NOSPACE, 2 CORRUPT
    PRIMARY KEY (member, alarm)
) WITHOUT ROWID;

CREATE TABLE meta (
    -- Single facts: compact_revision (-1 or missing: never compacted), other_changes (changes that left no row).
    name  TEXT PRIMARY KEY NOT NULL,
    value NOT NULL
) WITHOUT ROWID;

CREATE VIEW kv AS
    -- What is there now, one row per live key. No index on key exists, so this reads all of revisions once.
    --
    -- key           the key as text. A key that is not readable text is shown as an SQL blob literal, x'6B00FF', which
    --               can be pasted into a query on revisions.key. That is a key with bytes that are not valid UTF-8,
    --               with control characters (NUL too), that starts with x' itself, or that has more than 1024 bytes
    --               which are not all ASCII. So equal text always means equal keys.
    -- revision      the revision of the last change (mod_revision)
    -- lease         in hexadecimal as etcdctl prints it, NULL if none
    -- size          of the value, in bytes
    -- modified_at   UTC, with milliseconds
    -- author        who wrote it: auth user, else client certificate CN, else empty
    -- value         the bytes as they were put (a BLOB: use CAST(value AS TEXT) for text functions)
    SELECT CASE
             WHEN instr(r.key, x'00') > 0 OR CAST(r.key AS TEXT) GLOB 'x''*' THEN 'x''' || hex(r.key) || ''''
             WHEN CAST(r.key AS TEXT) NOT GLOB '*[^ -~]*' THEN CAST(r.key AS TEXT)
             WHEN length(r.key) > 1024
               OR CAST(r.key AS TEXT) GLOB '*[' || char(1) || '-' || char(31) || char(127) || '-' || char(159) || ']*'
               -- SQLite has no test for valid UTF-8: decode and encode each character, valid ones come back the same.
               OR EXISTS (WITH RECURSIVE place(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM place
                                                      WHERE i < length(CAST(r.key AS TEXT)))
                          SELECT 1 FROM place WHERE char(unicode(substr(CAST(r.key AS TEXT), i, 1)))
                                                    <> substr(CAST(r.key AS TEXT), i, 1))
             THEN 'x''' || hex(r.key) || ''''
             ELSE CAST(r.key AS TEXT)
           END AS key,
           r.rev AS revision,
           r.create_rev AS create_revision,
           r.version AS version,
           CASE WHEN r.lease <> 0 THEN printf('%016llx', r.lease) END AS lease,
           length(r.value) AS size,
           strftime('%Y-%m-%d %H:%M:%S', r.committed_at / 1000000, 'unixepoch')
             || printf('.%03d', r.committed_at / 1000 % 1000) AS modified_at,
           r.author AS author,
           r.value AS value
      FROM revisions AS r
     WHERE r.id IN (SELECT max(id) FROM revisions GROUP BY key)
       AND r.deleted = 0;

CREATE VIEW history AS
    -- Every change not yet compacted, oldest first. Columns as in kv, and
    --
    -- sub   place of the row inside its revision, from 0
    -- op    'put' or 'delete'. A delete has create_revision = version = size = 0
    -- at    when it was committed, UTC, with milliseconds
    SELECT r.rev AS revision,
           r.sub AS sub,
           CASE r.deleted WHEN 0 THEN 'put' ELSE 'delete' END AS op,
           CASE
             WHEN instr(r.key, x'00') > 0 OR CAST(r.key AS TEXT) GLOB 'x''*' THEN 'x''' || hex(r.key) || ''''
             WHEN CAST(r.key AS TEXT) NOT GLOB '*[^ -~]*' THEN CAST(r.key AS TEXT)
             WHEN length(r.key) > 1024
               OR CAST(r.key AS TEXT) GLOB '*[' || char(1) || '-' || char(31) || char(127) || '-' || char(159) || ']*'
               OR EXISTS (WITH RECURSIVE place(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM place
                                                      WHERE i < length(CAST(r.key AS TEXT)))
                          SELECT 1 FROM place WHERE char(unicode(substr(CAST(r.key AS TEXT), i, 1)))
                                                    <> substr(CAST(r.key AS TEXT), i, 1))
             THEN 'x''' || hex(r.key) || ''''
             ELSE CAST(r.key AS TEXT)
           END AS key,
           r.create_rev AS create_revision,
           r.version AS version,
           CASE WHEN r.lease <> 0 THEN printf('%016llx', r.lease) END AS lease,
           length(r.value) AS size,
           strftime('%Y-%m-%d %H:%M:%S', r.committed_at / 1000000, 'unixepoch')
             || printf('.%03d', r.committed_at / 1000 % 1000) AS at,
           r.author AS author,
           r.value AS value
      FROM revisions AS r
     ORDER BY r.id;

CREATE VIEW leases AS
    -- Leases in force, and what hangs on them.
    --
    -- id            in hexadecimal as etcdctl prints it
    -- granted_ttl   seconds
    -- deadline      when it expires unless kept alive, UTC, with milliseconds
    -- remaining     whole seconds until then by this machine's clock, 0 if it is overdue
    -- keys          how many live keys are attached
    SELECT printf('%016llx', l.id) AS id,
           l.ttl AS granted_ttl,
           strftime('%Y-%m-%d %H:%M:%S', l.deadline / 1000000, 'unixepoch')
             || printf('.%03d', l.deadline / 1000 % 1000) AS deadline,
           max(0, l.deadline / 1000000 - CAST(strftime('%s', 'now') AS INTEGER)) AS remaining,
           coalesce(a.keys, 0) AS keys
      FROM lease AS l
      LEFT JOIN (SELECT r.lease AS lease, count(*) AS keys
                   FROM revisions AS r
                  WHERE r.id IN (SELECT max(id) FROM revisions GROUP BY key)
                    AND r.deleted = 0 AND r.lease <> 0
                  GROUP BY r.lease) AS a ON a.lease = l.id
     ORDER BY l.deadline, l.id;
