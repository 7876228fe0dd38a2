//go:build linux

package cluster

import "github.com/quire-db/quire/test/etcd/partitions/network"

// Set makes the line from one member to another what l says. The way back is another line.
func (c *Cluster) Set(from, to *Member, l network.Line) { c.Network.Set(from.Host, to.Host, l) }

// SetAll makes every line between members what l says. Their clients' lines stay as they are.
func (c *Cluster) SetAll(l network.Line) {
	for _, from := range c.Members {
		for _, to := range c.Others(from) {
			c.Set(from, to, l)
		}
	}
}

// Heal opens every line, those of the clients too.
func (c *Cluster) Heal() {
	c.SetAll(network.Line{})
	for _, m := range c.Members {
		c.Network.Set(m.Host, c.Clients, network.Line{})
		c.Network.Set(c.Clients, m.Host, network.Line{})
	}
}

// Part cuts both lines between two members.
func (c *Cluster) Part(a, b *Member) {
	c.Set(a, b, network.Line{Cut: true})
	c.Set(b, a, network.Line{Cut: true})
}

// Split cuts every line between members of different groups. Clients reach them all.
func (c *Cluster) Split(groups ...[]*Member) {
	for i, one := range groups {
		for _, other := range groups[:i] {
			for _, a := range one {
				for _, b := range other {
					c.Part(a, b)
				}
			}
		}
	}
}

// unplug cuts every line of a member, those to the clients too.
func (c *Cluster) unplug(m *Member) {
	for _, other := range c.Others(m) {
		c.Part(m, other)
	}
	c.Network.Set(m.Host, c.Clients, network.Line{Cut: true})
	c.Network.Set(c.Clients, m.Host, network.Line{Cut: true})
}
