// Package watchpoller is etcd's Watch service over committed rows: rows become ordered events, events reach watchers.
//
// # What is promised
//
// A watch keeps etcd's guarantees (etcd API guarantees, Watch APIs), in its own words; each has a test of its name:
//
//   - Ordered - events are ordered by revision. An event will never appear on a watch if it precedes an event in time
//     that has already been posted.
//   - Unique - an event will never appear on a watch twice.
//   - Reliable - a sequence of events will never drop any subsequence of events within the available history window. If
//     there are events ordered in time as a < b < c, then if the watch receives events a and c, it is guaranteed to
//     receive b as long as b is in the available history window.
//   - Atomic - a list of events is guaranteed to encompass complete revisions. Updates in the same revision over multiple
//     keys will not be split over several lists of events. (A watcher that asks for fragments gets such a list in parts.)
//   - Resumable - A broken watch can be resumed by establishing a new watch starting after the last revision received in a
//     watch event before the break, so long as the revision is in the history window.
//   - Bookmarkable - Progress notification events guarantee that all events up to a revision have been already delivered.
//
// Further: the created answer of a watcher comes before its events, nothing of it comes after its canceled answer, and
// a client that reads slowly is never cut off and never slows another client or a writer. It goes back to reading
// history, with bounded memory (Options.StreamBytes). Only compaction can end a watch that the client did not.
//
// # What is not promised
//
// Watchers of one stream are not ordered among each other, except that a progress answer for all of them (watch id -1)
// comes after the events of each. Events of several revisions may come in one response. As in etcd, the header of a
// response with events bears the store's revision when they were read from history, which may be newer than the last
// event; only a progress answer's revision is a bookmark. A progress request is answered once all watchers of the
// stream have caught up, where etcd says nothing if one has not; several unanswered requests get one answer.
//
// # Who may call what
//
// Start makes a Poller. Serve runs one client and may be called by any number of goroutines at once. Close ends them all
// and waits. The package logs nothing; Options.Hooks report.
package watchpoller
