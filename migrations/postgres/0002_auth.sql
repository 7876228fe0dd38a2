-- 0002 enables auth: users, roles, and what roles allow. The auth revision and whether auth is on stand in meta
-- (auth_revision, missing: 1; auth_enabled, missing: 0). A batch that changes them says so in commits.auth, so that the
-- other processes hear of it; a process that does not know this column would let everybody in, and must not write any more.
-- Every quire that knows this file can open the data after it.
--
-- What 0001 says of names, reading and writing holds here too. Who may read this schema can read everything that users
-- may, and try passwords against their hashes.

-- +goose Up

CREATE TABLE ${schema}.auth_user (
    name        bytea   NOT NULL PRIMARY KEY,
    password    bytea   NOT NULL,
    no_password boolean NOT NULL
);
COMMENT ON TABLE ${schema}.auth_user IS 'Users. Names are UTF-8, in which a NUL may stand.';
COMMENT ON COLUMN ${schema}.auth_user.password IS 'a bcrypt hash';
COMMENT ON COLUMN ${schema}.auth_user.no_password IS 'there is none, the user is known by the common name of their certificate';

CREATE TABLE ${schema}.auth_grant (
    "user" bytea NOT NULL,
    role   bytea NOT NULL,
    PRIMARY KEY ("user", role)
);
COMMENT ON TABLE ${schema}.auth_grant IS 'Which users have which roles. The role root needs not exist.';

CREATE TABLE ${schema}.auth_role (
    name bytea NOT NULL PRIMARY KEY
);
COMMENT ON TABLE ${schema}.auth_role IS 'Roles.';

CREATE TABLE ${schema}.auth_permission (
    role      bytea   NOT NULL,
    place     integer NOT NULL,
    type      integer NOT NULL,
    key       bytea   NOT NULL,
    range_end bytea   NOT NULL,
    PRIMARY KEY (role, place)
);
COMMENT ON TABLE ${schema}.auth_permission IS 'What roles allow.';
COMMENT ON COLUMN ${schema}.auth_permission.place IS 'in the list of the role''s permissions, from 0';
COMMENT ON COLUMN ${schema}.auth_permission.type IS '0 read, 1 write, 2 both (etcd''s authpb.Permission)';
COMMENT ON COLUMN ${schema}.auth_permission.range_end IS 'where the range ends; empty: it is this one key; a zero byte: it has no end';

ALTER TABLE ${schema}.commits ADD COLUMN auth text;
COMMENT ON COLUMN ${schema}.commits.auth IS 'what the batch changed about users, roles and tokens, as JSON with names and bytes in base64 (backend/auth_change.go); of tokens it has hashes only. NULL: nothing';

UPDATE ${schema}.meta SET value = 2 WHERE name = 'writer_schema';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.change_auth(change json) RETURNS void LANGUAGE plpgsql VOLATILE AS
$$
BEGIN
    INSERT INTO ${schema}.meta AS m (name, value)
    VALUES ('auth_enabled', (change->>'enabled')::boolean::integer), ('auth_revision', (change->>'revision')::bigint)
        ON CONFLICT (name) DO UPDATE SET value = excluded.value;

    DELETE FROM ${schema}.auth_user AS u USING json_array_elements(change->'users') AS e
     WHERE u.name = decode(e->>'name', 'base64');
    DELETE FROM ${schema}.auth_grant AS g USING json_array_elements(change->'users') AS e
     WHERE g."user" = decode(e->>'name', 'base64');
    INSERT INTO ${schema}.auth_user (name, password, no_password)
    SELECT decode(e->>'name', 'base64'), decode(coalesce(e->>'password', ''), 'base64'), coalesce((e->>'no_password')::boolean, false)
      FROM json_array_elements(change->'users') AS e
     WHERE e->>'gone' IS NULL;
    INSERT INTO ${schema}.auth_grant ("user", role)
    SELECT decode(e->>'name', 'base64'), decode(r, 'base64')
      FROM json_array_elements(change->'users') AS e, json_array_elements_text(e->'roles') AS r;

    DELETE FROM ${schema}.auth_role AS o USING json_array_elements(change->'roles') AS e
     WHERE o.name = decode(e->>'name', 'base64');
    DELETE FROM ${schema}.auth_permission AS p USING json_array_elements(change->'roles') AS e
     WHERE p.role = decode(e->>'name', 'base64');
    INSERT INTO ${schema}.auth_role (name)
    SELECT decode(e->>'name', 'base64') FROM json_array_elements(change->'roles') AS e
     WHERE e->>'gone' IS NULL;
    INSERT INTO ${schema}.auth_permission (role, place, type, key, range_end)
    SELECT decode(e->>'name', 'base64'), p.place - 1, (p.allowed->>'type')::integer,
           decode(p.allowed->>'key', 'base64'), decode(coalesce(p.allowed->>'end', ''), 'base64')
      FROM json_array_elements(change->'roles') AS e,
           json_array_elements(e->'allows') WITH ORDINALITY AS p (allowed, place);
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.change_auth(json) IS 'Takes over what a batch has changed about users and roles.';

-- +goose StatementBegin
CREATE FUNCTION ${schema}.commit_auth_batch(
    expected_seq bigint, expected_token uuid, new_token uuid, writer_schema bigint, written_at bigint,
    ids bigint[], revs bigint[], subs bigint[], creates bigint[], versions bigint[], row_leases bigint[],
    deletes bigint[], authors text[], keys bytea[], vals bytea[],
    changed_leases bigint[], changed_ttls bigint[], changed_deadlines bigint[],
    all_alarm_members bigint[], all_alarm_kinds bigint[], compact bigint, auth text,
    OUT seq bigint, OUT token uuid, OUT clock bigint, OUT required_schema bigint
) LANGUAGE plpgsql VOLATILE
    SET lock_timeout = '4s' AS
$$
BEGIN
    SELECT c.seq, c.token, c.clock, c.required_schema INTO STRICT seq, token, clock, required_schema
      FROM ${schema}.commit_batch(expected_seq, expected_token, new_token, writer_schema, written_at,
           ids, revs, subs, creates, versions, row_leases, deletes, authors, keys, vals,
           changed_leases, changed_ttls, changed_deadlines, all_alarm_members, all_alarm_kinds, compact) AS c;
    IF token = new_token THEN
        UPDATE ${schema}.commits AS c SET auth = commit_auth_batch.auth WHERE c.seq = commit_auth_batch.seq;
        PERFORM ${schema}.change_auth(commit_auth_batch.auth::json);
    END IF;
END
$$;
-- +goose StatementEnd
COMMENT ON FUNCTION ${schema}.commit_auth_batch IS 'commit_batch for a batch that changes users, roles or tokens.';
