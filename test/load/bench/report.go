package main

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
)

// marks are the two lines of the document that a table stands between; everything else of it is left alone.
type marks struct{ begin, end string }

var (
	benchMarks    = marks{"<!-- bench:begin (written by make bench) -->", "<!-- bench:end -->"}
	raftMarks     = marks{"<!-- raft:begin (written by make bench-raft) -->", "<!-- raft:end -->"}
	postgresMarks = marks{"<!-- postgres:begin (written by make bench-postgres) -->", "<!-- postgres:end -->"}
)

// cell is what the rounds gave for one workload on one server.
type cell struct {
	rounds [][]float64 // of each round, one value per metric
	err    error       // the first failure: the cell's later rounds were not run
}

// row is one workload with its cells by server.
type row struct {
	w     workload
	cells map[string]*cell
}

// median of one metric over the rounds.
func (c *cell) median(i int) float64 {
	v := make([]float64, 0, len(c.rounds))
	for _, r := range c.rounds {
		v = append(v, r[i])
	}
	return medianOf(v)
}

// table renders the rows as Markdown. In brackets: the ratio to etcd, turned so that more than 1 is always better.
func table(servers []string, rows []row, rounds int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| | unit | %s |\n|---|---|%s\n", strings.Join(servers, " | "), strings.Repeat("---:|", len(servers)))
	for _, r := range rows {
		for i, m := range r.w.metrics {
			name := r.w.name
			if i > 0 {
				name = ""
			}
			fmt.Fprintf(&b, "| %s | %s |", name, m.unit)
			for _, s := range servers {
				fmt.Fprintf(&b, " %s |", r.text(s, i, rounds))
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// text is the content of one cell of the table.
func (r row) text(server string, i, rounds int) string {
	c := r.cells[server]
	if c == nil {
		return "–"
	}
	if c.err != nil && len(c.rounds) == 0 {
		if i > 0 {
			return "fails"
		}
		return "fails: " + short(c.err)
	}
	v := c.median(i)
	out := number3(v)
	if e := r.cells["etcd"]; e != nil && len(e.rounds) > 0 {
		if ratio := ratioTo(v, e.median(i), r.w.metrics[i].more); !math.IsNaN(ratio) {
			out += fmt.Sprintf(" (%.2f)", ratio)
		}
	}
	if n := len(c.rounds); n < rounds {
		out += fmt.Sprintf(" [%d rounds]", n)
	}
	return out
}

// ratioTo compares with etcd: more than 1 is better than etcd.
func ratioTo(v, etcd float64, more bool) float64 {
	if v == 0 || etcd == 0 {
		return math.NaN()
	}
	if more {
		return v / etcd
	}
	return etcd / v
}

// short makes an error fit for a table.
func short(err error) string {
	s := strings.Join(strings.Fields(err.Error()), " ")
	s = strings.ReplaceAll(s, "|", "/")
	if len(s) > 120 {
		s = s[:117] + "…"
	}
	return s
}

// number3 writes a value with three significant digits, thousands set apart; a dash for one that is not a number: the server
// has no such figure.
func number3(v float64) string {
	if math.IsNaN(v) {
		return "–"
	}
	if v == 0 {
		return "0"
	}
	digits := 2 - int(math.Floor(math.Log10(math.Abs(v))))
	if digits >= 0 {
		return strconv.FormatFloat(v, 'f', digits, 64)
	}
	scale := math.Pow(10, float64(-digits))
	s := strconv.FormatInt(int64(math.Round(v/scale)*scale), 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + " " + s[i:]
	}
	return s
}

// insert puts the text between the marks of the document, which is made if it is not there.
func insert(path string, m marks, text string) error {
	doc, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		doc = []byte("# Performance\n\n" + m.begin + "\n" + m.end + "\n")
	} else if err != nil {
		return err
	}
	from, to := bytes.Index(doc, []byte(m.begin)), bytes.Index(doc, []byte(m.end))
	if from < 0 || to < from {
		return fmt.Errorf("%s has no lines %q and %q to write the table between: add them", path, m.begin, m.end)
	}
	var out bytes.Buffer
	out.Write(doc[:from+len(m.begin)])
	out.WriteString("\n\n" + strings.TrimSpace(text) + "\n\n")
	out.Write(doc[to:])
	return os.WriteFile(path, out.Bytes(), 0o644)
}
