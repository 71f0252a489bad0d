package store

// Queue is a first-in, first-out queue of operations for stores with workers. It allocates nothing and locks nothing.
type Queue struct{ head, tail *Op }

// Push puts an operation at the end.
func (q *Queue) Push(op *Op) {
	op.next = nil
	if q.tail == nil {
		q.head = op
	} else {
		q.tail.next = op
	}
	q.tail = op
}

// Pop takes the oldest operation, or returns nil.
func (q *Queue) Pop() *Op {
	op := q.head
	if op == nil {
		return nil
	}
	if q.head = op.next; q.head == nil {
		q.tail = nil
	}
	op.next = nil
	return op
}
