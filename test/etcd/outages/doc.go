// Package outages breaks the Postgres database below running quires, with real servers, real networks and real
// processes, and looks at what clients see: the table "When something fails" of docs/postgres.md, row by row.
//
// A test compares four accounts of what happened: what each writer was told (load), what each watcher was sent (watching),
// what a client reads from each quire, and what stands in the table (SQL). No acknowledged write may be missing, none may be
// there twice, none that was refused may be there at all, and every watcher gets every event once.
//
// Most of the time the tests wait, for an outage to be long enough; so they run six at a time, even on two cores. Like the
// packages beside this one they use the binary that QUIRE_BIN names. Tests that draw random numbers print their seed and
// take it back with -args -seed=….
package outages
