package main

import (
	"errors"
	"fmt"
	"net"
)

// notifySystemd tells a service manager that started quire as Type=notify, as etcd's unit file does, what state it
// is in (sd_notify(3)): "READY=1" or "STOPPING=1". Without NOTIFY_SOCKET it does nothing.
func notifySystemd(env []string, state string) error {
	path := lookupEnv(env, "NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	_, err = conn.Write([]byte(state))
	return errors.Join(err, conn.Close())
}
