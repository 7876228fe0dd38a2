-- 0002 enables a database that several quires keep together (sqlraft): how far the log of the cluster is applied, who its
-- members are, and the view members for people. A database that belongs to no cluster has no rows in them. Every quire that
-- knows this file can open the data after it.
--
-- What 0001 says of names, reading and writing holds here too. Everything in these tables is the same on all members that
-- have applied the same entries of the log.

-- +goose Up

CREATE TABLE raft (
    -- One row in the database of a member of a cluster, none elsewhere. Whatever an entry of the log changes is written in
    -- one transaction with this row.
    only       INTEGER PRIMARY KEY CHECK (only = 1),
    applied    INTEGER NOT NULL, -- index of the newest entry of the log that is applied
    term       INTEGER NOT NULL, -- its term
    clock      INTEGER NOT NULL, -- what leases expire by, as of that entry: microseconds since 1970, about UTC, never set back
    clock_term INTEGER NOT NULL, -- term of the leader who has set it
    cluster    INTEGER NOT NULL  -- id of the cluster, a 64-bit pattern: ids above 2^63 show as negative numbers
);

CREATE TABLE member (
    -- The members of the cluster, and those that were removed. The view members shows the former for people.
    id          INTEGER PRIMARY KEY, -- a 64-bit pattern as above
    removed     INTEGER NOT NULL,    -- 1: it was removed and may never come back; the other columns are empty
    learner     INTEGER NOT NULL,    -- 1: it follows and has no vote
    name        TEXT    NOT NULL,    -- empty until it has started
    peer_urls   TEXT    NOT NULL,    -- JSON array of texts
    client_urls TEXT    NOT NULL     -- JSON array of texts, empty until it has started
);

CREATE VIEW members AS
    -- Who belongs to the cluster.
    --
    -- id           in hexadecimal as etcdctl prints it
    -- learner      1: it follows and has no vote
    -- peer_urls    JSON array
    -- client_urls  JSON array
    SELECT printf('%llx', id) AS id, name, learner, peer_urls, client_urls
      FROM member
     WHERE removed = 0
     ORDER BY name, id;
