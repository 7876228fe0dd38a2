package watchpoller

import "github.com/quire-db/quire/backend"

// A delivery collects what one read of rows yields, and queues it with one lock per stream. It also decides where a
// full stream stops: at a revision, never inside one.
//
// It and the fields of watcher that it uses belong to whoever owns the watcher: whoever holds Poller.mu for a synced one,
// catchUp for a lagging one.
type delivery struct {
	room    func(*stream) int
	shares  map[*stream]*share
	touched []*watcher // got or missed an event
}

// A share is what one stream may still take.
type share struct {
	room int
	last int64 // the revision accepted last
	cut  int64 // the first revision that did not fit; 0: none
}

func (d *delivery) begin(room func(*stream) int) {
	d.room = room
	if d.shares == nil {
		d.shares = make(map[*stream]*share)
	}
}

// wants says whether e is for w, given that its key is. REQUIRES: the caller owns w.
func (w *watcher) wants(e *backend.Event) bool {
	return e.Rev >= w.next && (len(w.filters) == 0 || !w.filtered(e.Type))
}

// add gives ev to w. Events come oldest first.
func (d *delivery) add(w *watcher, ev *event) {
	sh := w.share
	if sh == nil {
		if sh = d.shares[w.s]; sh == nil {
			sh = &share{room: d.room(w.s)}
			d.shares[w.s] = sh
		}
		w.share = sh
		d.touched = append(d.touched, w)
	}
	if sh.cut == 0 && sh.room <= 0 && ev.rev > sh.last {
		sh.cut = ev.rev
	}
	if sh.cut != 0 && ev.rev >= sh.cut {
		if w.missed == 0 {
			w.missed = ev.rev
		}
		return
	}
	sh.last = ev.rev
	sh.room -= w.cost(ev)
	w.fresh = append(w.fresh, ev)
}

// flush queues everything. head is the store's revision for events from history, as etcd puts it into their header;
// 0 for new events, which bear their own.
func (d *delivery) flush(head int64) {
	for _, w := range d.touched {
		if len(w.fresh) > 0 {
			w.s.events(w, w.fresh, head)
		}
	}
}

// end forgets everything.
func (d *delivery) end() {
	for _, w := range d.touched {
		w.share, w.missed, w.fresh = nil, 0, nil
	}
	clear(d.touched)
	d.touched = d.touched[:0]
	clear(d.shares)
}
