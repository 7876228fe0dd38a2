//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/quire-db/quire/test/etcd/partitions/cluster"
)

// electionTimeout is etcd's default.
const electionTimeout = time.Second

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "failover:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("failover", flag.ContinueOnError)
	kills := flags.Int("kills", 50, "how many leaders of each server to kill")
	members := flags.Int("members", 3, "of each cluster")
	binaries := flags.String("servers", "../../bin/quire,../../bin/peers/etcd", "the binaries, comma-separated")
	dir := flags.String("dir", "", "where data and logs go for the time (empty: a new directory where temporary files go)")
	word := flags.Bool("without-a-word", false, "cut the leader's lines together with the kill, as when a machine loses power: nobody sees its connections end")
	seed := flags.Uint64("seed", 0, "of the draws; 0 draws one")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *kills < 1 || *members < 3 {
		return errors.New("there have to be at least one kill and three members")
	}
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	fmt.Fprintf(os.Stderr, "repeat with -seed %d\n", *seed)
	rows := []string{row("server", "kills", "p50", "p90", "p99", "max", "above 1.5 × the election timeout"), "|---|--:|--:|--:|--:|--:|--:|"}
	for binary := range strings.SplitSeq(*binaries, ",") {
		path, err := filepath.Abs(binary)
		if err != nil {
			return err
		}
		m := measurement{kills: *kills, crash: *word, random: rand.New(rand.NewPCG(*seed, 0))}
		took, err := m.measure(ctx, *dir, cluster.Options{Binary: path, Members: *members, Seed: *seed})
		if err != nil {
			return fmt.Errorf("%s: %w", binary, err)
		}
		rows = append(rows, result(filepath.Base(path), took))
	}
	fmt.Println(strings.Join(rows, "\n"))
	return nil
}

func row(cells ...string) string { return "| " + strings.Join(cells, " | ") + " |" }

func result(server string, took []time.Duration) string {
	slices.Sort(took)
	slow := 0
	for _, d := range took {
		if d >= electionTimeout*3/2 {
			slow++
		}
	}
	cell := func(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
	return row(server, fmt.Sprint(len(took)), cell(quantile(took, 0.5)), cell(quantile(took, 0.9)), cell(quantile(took, 0.99)),
		cell(took[len(took)-1]), fmt.Sprint(slow))
}

// quantile is the smallest of the sorted values that a share of them does not exceed.
func quantile(sorted []time.Duration, share float64) time.Duration {
	i := int(math.Ceil(float64(len(sorted))*share)) - 1
	return sorted[max(0, min(i, len(sorted)-1))]
}
