// Package checked keeps bytes in a file of its own format, where every 4096 bytes have a checksum and two places. What [File.Sync] has confirmed is there after the death of
// the process or of the machine at any instant, whatever was being written then; and what the device has lost or torn of it is an error, never other bytes.
//
// # Format
//
// All numbers are little-endian. A header of 4096 bytes is followed by groups, one for each 2 MiB of contents:
//
//	offset 0    "MPCHECKD", version, unit, units of a group, 0 (4 bytes each), identity (8), size in bytes (8), CRC-32C of all that (4)
//	4096        group 0:  table, 512 entries of 16 bytes      8 KiB
//	                      places 0 of its 512 units           2 MiB
//	                      places 1                            2 MiB
//	...         group 1 ...
//
// A unit is 4096 bytes of contents, whole also at the end. Its entry is two sums, a state, and a check over these, the unit's number and the file's identity. A sum is the
// CRC-32C of what is in the place; 0 says that the unit is zeros, and its place is not looked at. The state names the place that is sealed, and says whether the other one is pending.
// An entry of zeros is a unit that was never written: zeros. So what is not written takes no space; a unit that is written once takes one place, one
// that is written again two. Zeros give back both. A file on a file system without holes takes twice the size of its contents.
//
// # Writing
//
// A sealed place is never written. Contents go to the other one, and then the entry says that it is pending, with its sum; if more is written before the next Sync, it goes to
// the same place. Nothing waits for the device. Sync is
//
//  1. no unit that is pending may be written, or is being written, until it is sealed (others may)
//  2. fdatasync: what is pending is on the device, and so are the entries that say so
//  3. the entries of what was pending are sealed: it counts, and the other place is free for what is written next
//  4. fdatasync: that it counts is on the device
//
// A machine that dies before 4 leaves units pending, with all, some, or none of their new contents and of their entry's. The sealed place is as it was. Who reads takes the
// pending place if its sum is right, which is what was written later; else the sealed one, which is what was synchronised last. After 4 there is no other:
// if its sum is not right, it is torn. Without step 4 the entry might still say pending when the machine dies, and a unit that the device loses after that would be taken for one
// that was never finished. (One entry with the sums of old and new contents over one place would take half the space, but then a device that dies within a page has lost
// what was synchronised of it, and each page-out waits for the device before it may begin.)
//
// A process that dies leaves all it has written in the kernel, and of one write whole units only. What was written before its death is pending; the first Sync of the next File
// looks for that in all tables, seals what is right with the rest, and takes back what is not: else it would promise contents whose place it writes again.
//
// Growing makes the file long enough before the header says so, and a new file is one of size 0 that grows. A file of 4096
// zeros is an empty one whose machine died then.
//
// What this costs beside a plain file: up to twice the space; the checksums and entries, a quarter more time for a page that the kernel has in memory; and one fdatasync more in each Sync
// (docs/operations.md has figures). A place beside the old contents is what saves the wait for the device before each write.
//
// # Errors
//
// A unit that is torn is [ErrTorn], with its offset; those beside it are in order. Its contents are lost, unless the file comes back from a copy; to write the whole
// unit anew heals it (an object's user: Region.Discard, which writes zeros). A file that is none of this package's, is of another version, or is shorter than it must be is [ErrFormat], and is not
// touched. What a file does not tell is that the device lost a whole sector of a table and gives zeros for it: then its 32 units were never written. A sum of 32 bits takes one of 2^32
// torn units for a right one.
//
// # Concurrency
//
// All methods may be called from any goroutine, but for ranges of units that do not overlap where one of them writes. Lock order: syncMu, gate, tableMu, mu. gate is held by
// writers, shared, for as long as a write takes, and by Sync when it begins and while it looks at a group that an earlier process left; tableMu for one write of entries; mu is a leaf and held
// for no system call. PeekAt takes mu alone.
package checked
