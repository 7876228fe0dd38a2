package backend

import "time"

// settleAfter is how long what is applied may stay without a sync while little is written.
const settleAfter = 3 * time.Second

// Durable is the index up to which everything applied survives a power cut. It never falls while the process runs, and
// follows Applied with each checkpoint: when the WAL has become long, and at the latest some seconds after a write.
func (db *DB) Durable() uint64 { return db.replica.durable.Load() }

// settle makes everything applied durable. REQUIRES: the commit token, or that nothing else uses db yet.
func (db *DB) settle() error {
	log := db.log.(*sqliteLog)
	if err := log.settle(); err != nil {
		if err = log.explain(err); !mendable(err) {
			err = db.replica.fail(err)
		}
		return err
	}
	db.replica.durable.Store(db.st.replica.index)
	return nil
}

// settleSome settles when it is time to, and else sees to it that it will be. It returns an error only where the member
// cannot go on. REQUIRES: the commit token.
func (db *DB) settleSome() error {
	log := db.log.(*sqliteLog)
	due, err := log.checkpointDue()
	if err == nil && due {
		err = db.settle()
	}
	if err == nil && due {
		return nil
	}
	if err != nil && db.opts.Hooks.StorageError != nil {
		db.opts.Hooks.StorageError(log.explain(err))
	}
	db.replica.unsettle()
	return db.replica.failure()
}

// unsettle has settleLoop know that there is something to do.
func (r *replica) unsettle() {
	select {
	case r.unsettled <- struct{}{}:
	default:
	}
}

func (db *DB) settleLoop() {
	for {
		select {
		case <-db.replica.unsettled:
		case <-db.ctx.Done():
			return
		}
		if !db.pause(settleAfter) {
			return
		}
		_, err := db.step(func() error {
			if db.Durable() == db.st.replica.index {
				return nil
			}
			return db.settle()
		})
		if err != nil {
			db.replica.unsettle() // StorageError has heard of it
		}
	}
}
