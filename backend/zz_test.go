package backend
import ("testing";"syscall")
func TestZZ(t *testing.T) {
	db := openTest(t, testPath(t), Options{})
	mustPut(t, db, "a", "1")
	var s *statements
	alone(t, db, func() error { s = watch(t, db.log.w); return nil })
	mustPut(t, db, "a", "2")
	t.Log(s.ran)
	for i := range 3 {
		alone(t, db, func() error { s.ran=nil; s.failAt = i+1; return nil })
		_, err := db.Write(t.Context(), Command{Request: putReq("k","v")})
		t.Log(i, s.ran, s.failed, err)
	}
	alone(t, db, func() error { s.failAt = 0; return nil })
	mustPut(t, db, "a", "2")
	f := failWrite(t, 1, syscall.ENOSPC)
		_, err := db.Write(t.Context(), Command{Request: putReq("k","v")})
	t.Log(err, f.hit())
	f = failWrite(t, 2, syscall.EIO)
		_, err = db.Write(t.Context(), Command{Request: putReq("k","v")})
	t.Log(err, f.hit())
	heal()
	mustPut(t, db, "a", "2")
}
