// Package network is a network for tests: hosts that are Linux network namespaces, and between every two of them lines
// that can be cut, lose packets and delay them, each direction by itself.
//
// The wire is this process. Each host has one TUN device, and every IP packet that leaves it is read here, looked at, and
// written to the device of the host that it is for, or not. So a cut line is what it is in a machine room: packets vanish,
// no connection is refused or reset, and TCP finds out by itself. It needs neither a bridge nor a packet filter nor netem,
// which not every kernel has.
//
// Nothing has a name outside this process, so that any number of networks exist side by side, with the same addresses;
// and nothing can be left over: namespaces and devices end with the threads and files of the process that made them,
// also when it is killed, and take the processes that Host.Start has started with them.
//
// It needs Linux and root.
package network
