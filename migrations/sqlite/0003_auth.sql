-- 0003 enables auth: users, roles, and what roles allow. The auth revision and whether auth is on stand in meta
-- (auth_revision, missing: 1; auth_enabled, missing: 0). Every quire that knows this file can open the data after it.
--
-- What 0001 says of names, reading and writing holds here too. Who may read this database can read everything that users
-- may, and try passwords against their hashes.

-- +goose Up

CREATE TABLE auth_user (
    name        TEXT    PRIMARY KEY NOT NULL,
    password    BLOB    NOT NULL, -- a bcrypt hash
    no_password INTEGER NOT NULL  -- 1: there is none, the user is known by the common name of their certificate
) WITHOUT ROWID;

CREATE TABLE auth_grant (
    -- Which users have which roles. The role root needs not exist.
    user TEXT NOT NULL,
    role TEXT NOT NULL,
    PRIMARY KEY (user, role)
) WITHOUT ROWID;

CREATE TABLE auth_role (
    name TEXT PRIMARY KEY NOT NULL
) WITHOUT ROWID;

CREATE TABLE auth_permission (
    -- What roles allow.
    role      TEXT    NOT NULL,
    place     INTEGER NOT NULL, -- in the list of the role's permissions, from 0
    type      INTEGER NOT NULL, -- 0 read, 1 write, 2 both (etcd's authpb.Permission)
    key       BLOB    NOT NULL, -- where the range begins, any bytes
    range_end BLOB    NOT NULL, -- where it ends; empty: it is this one key; x'00': it has no end
    PRIMARY KEY (role, place)
) WITHOUT ROWID;
