// Package confine takes away from this process what it does not need, for good: capabilities, privileges gained by execve(2), and files.
//
// All threads must be taken to account, for on Linux each has capabilities and a Landlock domain of its own. In a pure Go program the runtime makes a system
// call on every thread ([syscall.AllThreadsSyscall]), and threads that are born later inherit what their creator has. A program linked with cgo has threads
// that the runtime does not know: there only what the kernel itself does on all threads can be had, which for Landlock is Linux 7.0 and for
// capabilities nothing. What cannot be had is an error that is [errors.ErrUnsupported]; the caller says so and goes on, or does not.
//
// Errors wrap the errno.
package confine
